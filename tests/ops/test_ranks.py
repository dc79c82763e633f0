"""Operations over the rows of several processes: two and four give what one process with all rows gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from dino_fast.loss import koleo_loss, sinkhorn_center
from tests.ops.test_koleo_loss import rows
from tests.ops.test_sinkhorn_center import TEMP, layer

WORLD = 4
ROWS = {2: [1, 23], 4: [5, 0, 12, 7]}  # rows of each process, as iBOT's masked patches have them: uneven, or none


def part_of(rank: int, folder: str) -> None:
    """What process `rank` of four computes, saved to the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    groups = {2: dist.new_group([0, 1]), 4: dist.new_group([0, 1, 2, 3])}
    found: dict[Any, Any] = {}
    for world, group in groups.items():
        if rank >= world:
            continue
        z, w = layer()
        mine = z.split(ROWS[world])[rank]
        found["sinkhorn", world] = sinkhorn_center(mine, w, teacher_temp=TEMP, group=group)
        x = rows(24).requires_grad_()
        loss = koleo_loss(x.chunk(world)[rank], across_ranks=True, group=group)
        (gradient,) = torch.autograd.grad(loss, x)
        found["koleo", world] = loss.detach(), gradient.chunk(world)[rank]
    z, w = layer()
    found["alone"] = sinkhorn_center(z[: rank + 2], w, teacher_temp=TEMP, across_ranks=False)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(part_of, (str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("world", [2, 4])
def test_sinkhorn_center_is_that_of_all_rows(world: int, parts: list[dict[Any, Any]]) -> None:
    z, w = layer()
    wanted = sinkhorn_center(z, w, teacher_temp=TEMP)
    for rank in range(world):
        torch.testing.assert_close(parts[rank]["sinkhorn", world], wanted, rtol=0, atol=1e-6)


def test_sinkhorn_center_of_a_process_alone(parts: list[dict[Any, Any]]) -> None:
    z, w = layer()
    for rank in range(WORLD):
        wanted = sinkhorn_center(z[: rank + 2], w, teacher_temp=TEMP)
        torch.testing.assert_close(parts[rank]["alone"], wanted, rtol=0, atol=1e-6)
    assert (parts[0]["alone"] - parts[1]["alone"]).abs().max() > 1e-3


@pytest.mark.parametrize("world", [2, 4])
def test_koleo_across_ranks_is_that_of_all_rows(world: int, parts: list[dict[Any, Any]]) -> None:
    x = rows(24).requires_grad_()
    wanted = koleo_loss(x)
    (gradient,) = torch.autograd.grad(wanted, x)
    losses, gradients = zip(*(parts[rank]["koleo", world] for rank in range(world)), strict=True)
    torch.testing.assert_close(torch.stack(losses).mean(), wanted.detach())
    torch.testing.assert_close(torch.cat(gradients) / world, gradient)  # DDP averages
    assert (wanted - koleo_loss(x.chunk(world)[0])).abs() > 1e-2  # neighbors of other processes count
