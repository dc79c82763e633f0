"""k-NN accuracy while training: each process makes the features of its share of the images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from dino_fast.data import Source, Subset, eval_batches
from dino_fast.engine import distributed as many
from dino_fast.engine.distributed import Ranks
from dino_fast.engine.signals import Halted
from dino_fast.engine.train_state import Learner, configured_backbone
from dino_fast.models import MultiCropWrapper

Watch = Callable[[Iterable[Any]], Iterator[Any]]  # passes items on; raises Halted once a signal came


def measure_knn(run: Learner, channels: int, bank: Source, test: Source, watch: Watch) -> tuple[dict[str, float], str]:
    """k-NN accuracy on `test`: `knn` of the teacher, `knn_student`, and a line about them; nothing after a signal."""
    from dino_fast.eval.knn import knn_accuracy

    config, found, text = run.config, {}, ""
    for name, model in (("knn", run.teacher), ("knn_student", run.student)):
        backbone = whole_backbone(run, model, channels)
        of_bank, of_test = (features_of_all(run, backbone, source, watch) for source in (bank, test))
        if of_bank is None or of_test is None:
            return {}, ""
        (known, labels), (queries, truth) = of_bank, of_test
        k = min(config.knn_k, len(known))
        top1 = 0.0
        if run.ranks.first:
            top1 = float(knn_accuracy(known, labels, queries, truth, k=k, temperature=config.knn_temperature)[0])
        found[name] = run.ranks.from_first(lambda value=top1: value)  # type: ignore[misc]
        text = f"k-NN (k={k}, temperature {config.knn_temperature:g}, {len(queries)} held-out images): "
    return found, text + f"teacher {found['knn']:.1%}, student {found['knn_student']:.1%}"


def features_of_all(run: Learner, backbone: nn.Module, source: Source, watch: Watch) -> tuple[Tensor, Tensor] | None:
    """Features [N, C] and labels [N] of the labelled images, in order; None where a signal came to any process."""
    from dino_fast.eval.knn import extract_features

    share, config = share_of(source, run.ranks), run.config
    features = torch.empty(0, cast(int, backbone.embed_dim), dtype=torch.float32, device="cpu")
    labels = torch.empty(0, dtype=torch.int64, device="cpu")
    halted = False
    try:
        if len(share):
            batches = eval_batches(share, config.global_size, config.mean, config.std)
            features, labels = extract_features(backbone, watch(batches))
    except Halted:
        halted = True
    if run.ranks.agree(halted)[0]:
        return None
    features, labels = run.ranks.rows(features), run.ranks.rows(labels)
    return features[labels >= 0], labels[labels >= 0]


def share_of(source: Source, ranks: Ranks) -> Source:
    """This process's images: the shares of all, one after the other, are the source."""
    if ranks.world == 1:
        return source
    share = -(-len(source) // ranks.world)
    return Subset(source, np.arange(len(source))[ranks.rank * share : (ranks.rank + 1) * share])


def whole_backbone(run: Learner, model: MultiCropWrapper, channels: int) -> nn.Module:
    """The network's backbone; where it is cut over processes, a whole copy of it in each: all must call this, and none
    waits for another while it uses it."""
    if not hasattr(next(model.backbone.parameters()), "to_local"):
        return model.backbone
    with torch.random.fork_rng(devices=[]):  # its weights are drawn, and overwritten
        copy = configured_backbone(run.config, channels, 0.0)
    copy.load_state_dict(many.gathered(model.backbone.state_dict(), keep=True))
    return copy.to(run.device).requires_grad_(False)
