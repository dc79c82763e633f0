"""k-NN accuracy during training: each process computes the features of its share of the images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from dino_fast.data import Source, Subset, eval_batches
from dino_fast.dtensor import is_sharded
from dino_fast.engine.build import build_configured_backbone
from dino_fast.engine.distributed import DistContext
from dino_fast.engine.parallelize import full_state_dict
from dino_fast.engine.signals import Halted
from dino_fast.engine.train_state import TrainState
from dino_fast.knn import extract_features, knn_accuracy, leave_one_out_accuracy
from dino_fast.models import MultiCropWrapper

Watch = Callable[[Iterable[Any]], Iterator[Any]]  # passes items through; raises Halted after a signal


def measure_knn(
    state: TrainState, channels: int, bank: Source, test: Source | None, watch: Watch
) -> tuple[dict[str, float], str]:
    """k-NN accuracies of teacher and student, as shares of the labeled images that are classified.

    `bank` holds the images that vote; without `test` each of them is classified by the others. Returns
    {"knn": teacher's, "knn_student": student's} and a line of text about them; ({}, "") after a signal.
    """
    config, accuracies, text = state.config, {}, ""
    for name, model in (("knn", state.teacher), ("knn_student", state.student)):
        backbone = whole_backbone(state, model, channels)
        extracted = [all_features(state, backbone, source, watch) for source in (bank, test) if source is not None]
        sets = [features for features in extracted if features is not None]
        if len(sets) < len(extracted):
            return {}, ""
        (known, labels), (queries, truth) = sets[0], sets[-1]
        k = min(config.knn_k, len(known) - (test is None))
        if k < 1:  # of two images one cannot be read
            return {}, ""
        top1 = 0.0
        if state.context.first and test is None:
            top1 = leave_one_out_accuracy(known, labels, k, config.knn_temperature)[0]
        elif state.context.first:
            top1 = knn_accuracy(known, labels, queries, truth, k, config.knn_temperature)[0]
        accuracies[name] = state.context.run_on_rank0(lambda value=top1: value)  # type: ignore[misc]
        whose = "training images, leaving one out" if test is None else "held-out images"
        text = f"k-NN (k={k}, temperature {config.knn_temperature:g}, {len(queries)} {whose}): "
    return accuracies, text + f"teacher {accuracies['knn']:.1%}, student {accuracies['knn_student']:.1%}"


def all_features(state: TrainState, backbone: nn.Module, source: Source, watch: Watch) -> tuple[Tensor, Tensor] | None:
    """Features [N, C] and labels [N] of the labeled images, in order; None if any process received a signal."""
    share, config = share_of(source, state.context), state.config
    features = torch.empty(0, cast(int, backbone.embed_dim), dtype=torch.float32, device="cpu")
    labels = torch.empty(0, dtype=torch.int64, device="cpu")
    halted = False
    try:
        if len(share):
            batches = eval_batches(share, config.global_size, config.mean, config.std)
            features, labels = extract_features(backbone, watch(batches))
    except Halted:
        halted = True
    if state.context.all_reduce_max(halted)[0]:
        return None
    features, labels = state.context.all_gather_rows(features), state.context.all_gather_rows(labels)
    return features[labels >= 0], labels[labels >= 0]


def share_of(source: Source, context: DistContext) -> Source:
    """This process's contiguous share of the images."""
    if context.world == 1:
        return source
    share = -(-len(source) // context.world)
    return Subset(source, np.arange(len(source))[context.rank * share : (context.rank + 1) * share])


def whole_backbone(state: TrainState, model: MultiCropWrapper, channels: int) -> nn.Module:
    """The network's backbone, or a gathered copy of a sharded one, whose forward pass needs no collectives.

    All processes must call this.
    """
    if not is_sharded(next(model.backbone.parameters())):
        return model.backbone
    with torch.random.fork_rng(devices=[]):  # random weights, overwritten below
        copy = build_configured_backbone(state.config, channels, 0.0)
    copy.load_state_dict(full_state_dict(model.backbone.state_dict(), keep=True))
    return cast(nn.Module, copy.to(state.device).requires_grad_(False))
