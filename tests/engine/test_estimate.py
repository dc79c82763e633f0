from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dino_fast.engine import estimate as cost
from dino_fast.engine.build import build_model
from dino_fast.engine.config import Config, build_config
from dino_fast.engine.estimate import dry_run_report as report
from dino_fast.errors import UserError
from tests import original


def published(**given: object) -> Config:
    return Config(**{"data": "x", "drop_path_rate": 0.0, **given})  # type: ignore[arg-type]


def test_the_formula_is_what_pytorch_counts_in_the_originals_forward_pass() -> None:
    """But for the last block, which needs its class token alone."""
    config = published(local_crops=0)
    sizes = cost.sizes_of(config, 3)
    assert sizes is not None and (sizes.global_tokens, sizes.tokens) == (197, 4 * 197)
    network = original.ViT(224, 16, 3, 384, 12, 6).to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.empty(1, 3, 224, 224, device="meta"))
    n, C = 197, 384
    unneeded = (n - 1) * 20 * C * C + 4 * (n * n - n) * C
    assert cost.forward_flops(sizes, n, [0.0] * 12) == pytest.approx(counter.get_total_flops() - unneeded, rel=1e-3)


def test_operations_of_an_image_of_the_published_run() -> None:
    flops = cost.flops_per_image(published(), 3)
    assert flops is not None
    # 690 tokens of the student, thrice, and 394 of the teacher, in blocks of 24 C^2 + 4 n C each; less the last block's
    # rows, which nobody reads.
    assert 103e9 < flops < 108e9
    dropped = cost.flops_per_image(published(drop_path_rate=0.2), 3)
    assert dropped is not None and 0.88 * flops < dropped < 0.95 * flops
    resnet = cost.flops_per_image(published(arch="torchvision/resnet50", local_crops=0), 3)
    head = 2 * (2048 * 2048 + 2048 * 2048 + 2048 * 256 + 256 * 65536) * 8
    assert resnet == pytest.approx(8 * 8.18e9 + head, rel=0.01)  # 4.09 G products and sums of a pixel crop of 224


def test_parameters_are_those_of_the_networks() -> None:
    config = published(out_dim=1000, arch="vit_tiny")
    model = build_model(config, 3, 0.0)
    counted = tuple(sum(p.numel() for p in part.parameters()) for part in (model.backbone, model.head))
    assert cost.parameters(config, 3) == counted


def test_bytes_on_the_wire() -> None:
    backbone, head = cost.parameters(published(), 3)
    assert cost.wire_bytes(published(), 3, 1) == 0
    assert cost.wire_bytes(published(), 3, 8) == pytest.approx(2 * 7 / 8 * 4 * (backbone + head))
    whole, cut = (cost.wire_bytes(published(fsdp=shard, precision="bf16"), 3, 8) for shard in ("none", "full"))
    assert cut < 0.8 * whole  # the prototypes stay where they are


def test_memory_is_cut_with_the_weights() -> None:
    parts = {shard: cost.memory_parts(published(fsdp=shard), 3, "fp32", 4, "cuda") for shard in ("none", "full")}
    weights = [next(iter(part.values())) for part in parts.values()]
    assert weights[0] == 4 * weights[1] == 20 * sum(cost.parameters(published(), 3))
    kept = [list(cost.memory_parts(published(), 3, "fp32", 1, device).values())[-1] for device in ("cuda", "cpu")]
    assert kept[1] == 6 / 16 * kept[0]


def test_a_dry_run_tells_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = report(build_config({"device": "cpu"}), {})
    for part in (
        r"backbone +vit_tiny/7, [\d.]+ M parameters",
        r"steps +[\d,]+ of 32 images",
        r"GFLOP, 78 tokens \(student 44\)",
        "GB in each process",
        r"images/s, [\d.e-]+ TFLOP/s",
        "from trial steps of 16 and 32 images",
    ):
        assert re.search(part, text), (part, text)
    assert "on the wire" not in text
    several = report(build_config({"device": "cpu"}), {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"})
    assert "MB sent by each process" in several
    with pytest.raises(UserError, match="does not divide among 5 processes"):
        report(build_config({"device": "cpu"}), {"RANK": "0", "WORLD_SIZE": "5"})
    assert not list(tmp_path.iterdir())
