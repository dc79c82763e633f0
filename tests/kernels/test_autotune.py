"""DINO_FAST_AUTOTUNE=1 measures each tile that may be taken, once; without it the first is taken."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

from dino_fast.kernels import autotune  # noqa: E402
from tests.fake_gpu import FakeDevice, fake_gpu  # noqa: E402


@pytest.fixture
def timed(monkeypatch):
    """Tiles that were timed, where a tile is its own time."""
    tiles = []

    def do_bench(launch):
        launch()
        return tiles[-1]

    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    monkeypatch.setattr(autotune, "_measured", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", FakeDevice)
    monkeypatch.setenv("DINO_FAST_AUTOTUNE", "1")
    return tiles


def test_takes_the_fastest_and_measures_once(timed):
    gpu = torch.device("cuda", 0)
    assert [autotune.pick("a", (3, 1, 2), gpu, timed.append) for _ in range(2)] == [1, 1]
    assert timed == [3, 1, 2]
    assert autotune.pick("b", (3, 2), gpu, timed.append) == 2  # another shape is measured anew


def test_batches_of_any_size_are_measured_once_an_octave(timed):
    """iBOT masks another number of patches in each batch."""
    from dino_fast.kernels import linear_dino_loss, linear_dino_loss_half

    with fake_gpu():
        device = torch.device("cuda:0")
        weight = torch.empty((4096, 256), dtype=torch.bfloat16, device=device)
        layer = linear_dino_loss.Layer(weight, None)
        for patches in (3000, 3001, 3760, 4096):
            rows = torch.empty((1, patches, 256), dtype=torch.bfloat16, device=device)
            table = {(9, 0): (3, 1, 2)}
            assert linear_dino_loss_half._tile_of("attend", table, rows, (1, 4096), timed.append) == 1
            layers, tiles = (layer, layer), linear_dino_loss.ATTEND_TILES
            linear_dino_loss._tile("weigh", tiles, rows, layers, 1, lambda tile: timed.append(0))
    assert timed == [3, 1, 2, *[0] * len(linear_dino_loss.ATTEND_TILES[2, 2, 256])]


def test_takes_the_first_where_nothing_is_to_be_measured(timed, monkeypatch):
    assert autotune.pick("a", (3, 1), torch.device("cpu"), timed.append) == 3
    assert autotune.pick("a", (3,), torch.device("cuda"), timed.append) == 3
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert autotune.pick("a", (3, 1), torch.device("cuda"), timed.append) == 3
    monkeypatch.delenv("DINO_FAST_AUTOTUNE")
    assert autotune.pick("a", (3, 1), torch.device("cuda"), timed.append) == 3
    assert timed == []
