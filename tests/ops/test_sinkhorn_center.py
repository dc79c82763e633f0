from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from dino_fast.loss import linear_dino_loss, sinkhorn_center
from dino_fast.ops import sinkhorn_center as operation
from dino_fast.ops.sinkhorn_center import sinkhorn_center_reference

TEMP = 0.04


def layer(N: int = 24, K: int = 300, D: int = 16, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Rows and weight whose logits reach about `scale`."""
    generator = torch.Generator().manual_seed(N)
    z = normalize(torch.randn(N, D, generator=generator, dtype=torch.float32, device="cpu"), dim=1)
    w = torch.randn(K, D, generator=generator, dtype=torch.float32, device="cpu")
    return scale * z, w / (z @ w.T).abs().max()


def published(logits: Tensor, temp: float, row_maxima: bool = False, iterations: int = 3) -> Tensor:
    """DINOv2's sinkhorn_knopp_teacher (Apache-2.0) of one process, transcribed; `row_maxima`: with its public fix."""
    logits = logits / temp
    if row_maxima:
        logits = logits - logits.max(dim=1, keepdim=True).values
    Q = torch.exp(logits).t()  # [K, N]
    K, B = Q.shape
    Q = Q / torch.sum(Q)
    for _ in range(iterations):
        Q = Q / torch.sum(Q, dim=1, keepdim=True) / K
        Q = Q / torch.sum(Q, dim=0, keepdim=True) / B
    return (Q * B).t()


def targets(logits: Tensor, center: Tensor, temp: float = TEMP) -> Tensor:
    return torch.softmax((logits.double() - center.double()) / temp, dim=1)


@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_softmax_with_this_center_gives_the_published_targets(iterations: int) -> None:
    z, w = (x.double() for x in layer())
    wanted = published(z @ w.T, TEMP, iterations=iterations)
    for function in (sinkhorn_center, sinkhorn_center_reference):
        center = function(z, w, teacher_temp=TEMP, iterations=iterations)
        torch.testing.assert_close(targets(z @ w.T, center), wanted, rtol=1e-10, atol=1e-14)
    plain = torch.softmax(z @ w.T / TEMP, dim=1)
    assert (wanted - plain).abs().max() > 0.1  # normalizing over images matters here


def rounding(z: Tensor, w: Tensor) -> float:
    """Bound on a target's relative error in float32: a logit's is eps |z| |w|, an exponential's eps times the magnitude
    of its argument; the center adds the same for each of 3 iterations."""
    magnitude = (z.abs().double() @ w.abs().double().T).max().item() / TEMP
    return 8 * torch.finfo(torch.float32).eps * magnitude


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_float32_is_finite_and_right_where_the_published_exponential_overflows(scale: float) -> None:
    z, w = layer(scale=scale)
    logits = z.double() @ w.double().T
    exact = targets(logits, sinkhorn_center_reference(z.double(), w.double(), teacher_temp=TEMP))
    center = sinkhorn_center(z, w, teacher_temp=TEMP)
    assert center.dtype == torch.float32 and center.isfinite().all()
    torch.testing.assert_close(targets(logits, center), exact, rtol=rounding(z, w), atol=1e-12)
    assert published(logits.float(), TEMP).isfinite().all() == (scale == 1.0)


def test_the_row_maxima_fix_is_another_answer() -> None:
    """Scaling a row before the first normalization over rows changes the result of three iterations."""
    z, w = (x.double() for x in layer(scale=2.0))
    logits = z @ w.T
    exact = published(logits, TEMP)
    assert (published(logits, TEMP, row_maxima=True) - exact).abs().max() > 1e-2
    torch.testing.assert_close(targets(logits, sinkhorn_center(z, w, teacher_temp=TEMP)), exact, rtol=1e-9, atol=1e-14)


def test_rows_that_underflow_everywhere_take_the_exact_way() -> None:
    """Rows so weak at every prototype that their sums of exp are 0 beside the others' maxima."""
    z, w = layer(N=4, K=8, D=4)
    z, w = torch.cat([z, torch.ones(1, 4)]), torch.cat([w, torch.ones(8, 4)], dim=0)
    z[:4], w = 400 * z[:4].abs(), w.abs() + 0.1
    center = sinkhorn_center(z, w, teacher_temp=TEMP)
    _, sums = operation._iterate(operation._Tiles(z / TEMP, w, None), torch.zeros(5), 1, None)
    assert sums.min() < operation.SMALLEST_SUM
    wanted = sinkhorn_center_reference(z.double(), w.double(), teacher_temp=TEMP)
    logits = z.double() @ w.double().T
    torch.testing.assert_close(targets(logits, center), targets(logits, wanted), rtol=rounding(z, w), atol=1e-12)


@pytest.mark.parametrize("K", [1, 7, 300])
def test_tiles_of_any_size_and_weight_norm(K: int, monkeypatch: pytest.MonkeyPatch) -> None:
    z, w = layer(K=K)
    gain = torch.rand(K, generator=torch.Generator().manual_seed(1), dtype=torch.float32, device="cpu") + 0.5
    wanted = sinkhorn_center_reference(z.double(), w.double(), teacher_gain=gain.double(), teacher_temp=TEMP)
    monkeypatch.setattr(operation, "TILE", 7 * len(z))
    got = sinkhorn_center(z.unflatten(0, (2, 12)), w, teacher_gain=gain, teacher_temp=TEMP)
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-5)
    effective = w * (gain / w.norm(dim=1))[:, None]
    torch.testing.assert_close(sinkhorn_center(z, effective, teacher_temp=TEMP), got, rtol=0, atol=1e-5)


def test_no_matrix_of_rows_by_prototypes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.size = max(
                [self.size, *(x.numel() for x in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(x))]
            )
            return out

    z, w = layer(K=2000)
    monkeypatch.setattr(operation, "TILE", 1 << 12)
    with Largest() as seen:
        sinkhorn_center(z, w, teacher_temp=TEMP)
    assert seen.size <= max(1 << 12, w.numel()) < len(z) * len(w)


def test_the_loss_with_this_center_is_dinov2s() -> None:
    z, w = layer(N=12)
    student = layer(N=12, K=300)[0].flip(0)
    center = sinkhorn_center(z, w, teacher_temp=TEMP)
    loss, _ = linear_dino_loss(
        student.unflatten(0, (2, 6)), w, z.unflatten(0, (2, 6)), w, center, student_temp=0.1, teacher_temp=TEMP
    )
    q = published((z @ w.T).double(), TEMP).unflatten(0, (2, 6))
    log_p = torch.log_softmax((student @ w.T).double() / 0.1, dim=1).unflatten(0, (2, 6))
    wanted = -((q[0] * log_p[1]).sum(1).mean() + (q[1] * log_p[0]).sum(1).mean()) / 2
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"teacher": torch.ones(4, 3)}, r"rows are \[..., D\] and its weight \[K, D\]; got \[4, 3\] and \[5, 2\]"),
        ({"teacher": torch.ones(0, 2)}, "no rows to normalize over; give at least one"),
        ({"teacher_temp": 0.0}, "temperature must be positive; got 0.0"),
        ({"iterations": 0}, "at least one iteration"),
        ({"teacher_gain": torch.ones(4)}, r"gain is \[K\] = \[5\]; got \[4\]"),
        ({"teacher": torch.ones(4, 2, dtype=torch.int64)}, "rows must be of a floating-point dtype"),
        ({"teacher_weight": torch.ones(5, 2, device="meta")}, "weight is on meta, the rows on cpu"),
    ],
)
def test_bad_input(change: dict[str, object], message: str) -> None:
    given = {"teacher": torch.ones(4, 2), "teacher_weight": torch.ones(5, 2), "teacher_temp": 0.04} | change
    with pytest.raises(ValueError, match=message):
        sinkhorn_center(given.pop("teacher"), given.pop("teacher_weight"), **given)
