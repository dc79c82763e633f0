"""DINOLoss against the plain transcription of the original: numbers, centre, state, schedule, and where it is used."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dino_fast.loss import DINOLoss, dino_loss, linear_dino_loss, teacher_temp_schedule
from dino_fast.ops.dino_loss import dino_loss_reference

from .original.loss import DINOLoss as Original

V, B, K = 5, 3, 200
ARGUMENTS = (K, V, 0.04, 0.07, 3, 6)


def outputs(step, dtype=torch.float32, images=B):
    generator = torch.Generator().manual_seed(step)
    student = torch.randn(V * images, K, generator=generator).to(dtype)
    teacher = torch.randn(2 * images, K, generator=generator).to(dtype) + 0.1 * step
    return student.requires_grad_(), teacher


def both_steps(ours, original, step, epoch):
    """One forward and backward of each on the same logits; returns (loss, gradient) pairs."""
    results = []
    for module in (ours, original):
        student, teacher = outputs(step)
        loss = module(student, teacher, epoch)
        loss.backward()
        results.append((loss.detach(), student.grad))
    return results


def test_equals_the_original_over_many_steps():
    ours, original = DINOLoss(*ARGUMENTS), Original(*ARGUMENTS)
    assert ours.teacher_temp_schedule == pytest.approx(list(original.teacher_temp_schedule))
    for step in range(30):
        (loss, gradient), (expected, expected_gradient) = both_steps(ours, original, step, epoch=step // 5)
        torch.testing.assert_close(loss, expected, rtol=3e-6, atol=0)
        torch.testing.assert_close(gradient, expected_gradient, rtol=2e-5, atol=1e-8)
        torch.testing.assert_close(ours.center, original.center, rtol=1e-6, atol=1e-7)


def test_state_dict_is_interchangeable():
    ours, original = DINOLoss(*ARGUMENTS), Original(*ARGUMENTS)
    both_steps(ours, original, 0, 0)
    assert list(ours.state_dict()) == list(original.state_dict()) == ["center"]
    assert ours.center.shape == (1, K)
    resumed = DINOLoss(*ARGUMENTS)
    resumed.load_state_dict(original.state_dict())
    back = Original(*ARGUMENTS)
    back.load_state_dict(ours.state_dict())
    (loss, _), (expected, _) = both_steps(resumed, original, 1, 1)
    torch.testing.assert_close(loss, expected, rtol=3e-6, atol=0)
    assert torch.equal(back.center, copy.deepcopy(ours).center)


def test_entropy_and_kl_of_the_last_forward():
    module = DINOLoss(*ARGUMENTS)
    student, teacher = outputs(0)
    loss = module(student, teacher, 0)
    p = torch.softmax(teacher.double() / 0.04, -1)
    entropy = torch.special.entr(p).sum(-1).mean()
    assert module.teacher_entropy.item() == pytest.approx(entropy.item(), rel=1e-5)
    assert module.kl.item() == pytest.approx(loss.item() - entropy.item(), rel=1e-5)
    assert not module.teacher_entropy.requires_grad and not module.kl.requires_grad


def test_temperature_schedule():
    assert teacher_temp_schedule(0.04, 0.07, 4, 6) == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.07, 0.07])
    assert teacher_temp_schedule(0.04, 0.07, 0, 2) == [0.07, 0.07]
    assert teacher_temp_schedule(0.04, 0.07, 1, 2) == [0.04, 0.07]
    module = DINOLoss(*ARGUMENTS)
    assert module.teacher_temp(5) == module.teacher_temp(500) == 0.07  # an epoch beyond the schedule


def test_warm_up_longer_than_the_run_is_shortened():
    with pytest.warns(UserWarning, match="warm-up of 30 epochs is longer than the run; it is shortened to 2"):
        module = DINOLoss(K, V, 0.04, 0.07, 30, 2)
    assert module.teacher_temp_schedule == pytest.approx([0.04, 0.07])
    assert module(*outputs(0), 1).isfinite()


def test_functional_is_the_reference():
    student, teacher = outputs(0)
    student, teacher, center = student.view(V, B, K), teacher.view(2, B, K), torch.zeros(K)
    expected = dino_loss_reference(student, teacher, center, student_temp=0.1, teacher_temp=0.04).loss
    found = dino_loss(student, teacher, center, student_temp=0.1, teacher_temp=0.04)
    torch.testing.assert_close(found, expected, rtol=3e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    """Half logits from a linear layer under autocast, and a loss scale, as in mixed-precision training."""
    results = []
    for make in (DINOLoss, Original):
        torch.manual_seed(0)
        module, layer = make(*ARGUMENTS), torch.nn.Linear(16, K, bias=False)
        x = torch.randn(V * B, 16)
        with torch.autocast("cpu", dtype):
            logits = layer(x)
            assert logits.dtype == dtype
            # the original divides in half precision; what it should give is the loss of these logits in float32
            loss = module(logits if make is DINOLoss else logits.float(), logits[: 2 * B].detach().float(), 0)
        (loss * 1024).backward()
        results.append((loss.detach(), layer.weight.grad, module.center))
    assert results[0][0].dtype == torch.float32 and results[0][2].dtype == torch.float32
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=2e-2, atol=2e-2 * results[1][1].abs().max().item())
    torch.testing.assert_close(results[0][2], results[1][2], rtol=1e-5, atol=1e-6)


def test_gradient_accumulation():
    """Backwards add up, and the float16 backward does not see the centre that the next forward changed."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 2e-2)):
        grads = []
        for make in (DINOLoss, Original):
            module, weight = make(*ARGUMENTS), torch.ones(K, requires_grad=True)
            losses = []
            for micro in range(3):
                student, teacher = outputs(micro)
                logits = (student.detach() * weight).to(dtype if make is DINOLoss else torch.float32)
                losses.append(module(logits, teacher, 0) / 3)
            for loss in losses:  # all forwards come first
                loss.backward()
            grads.append(weight.grad)
        torch.testing.assert_close(grads[0], grads[1], rtol=tolerance, atol=tolerance * grads[1].abs().max().item())


def test_no_grad_and_evaluation():
    module, original = DINOLoss(*ARGUMENTS), Original(*ARGUMENTS)
    with torch.no_grad():
        loss, expected = module(*outputs(0), 0), original(*outputs(0), 0)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected, rtol=3e-6, atol=0)
    torch.testing.assert_close(module.center, original.center)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_compiles_without_a_break(dtype):
    eager = DINOLoss(*ARGUMENTS)
    module = DINOLoss(*ARGUMENTS)
    compiled = torch.compile(module, fullgraph=True)
    for step in range(3):
        results = []
        for function in (eager, compiled):
            student, teacher = outputs(step, dtype)
            loss = function(student, teacher, 0)
            loss.backward()
            results.append((loss.detach(), student.grad))
        torch.testing.assert_close(results[1], results[0])
        torch.testing.assert_close(module.center, eager.center)
        assert module.kl.item() == pytest.approx(eager.kl.item(), rel=1e-5)


def _rank(rank, world, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world)
    module, original = DINOLoss(*ARGUMENTS), Original(*ARGUMENTS)
    for step in range(4):
        for loss in (module, original):
            student, teacher = outputs(10 * step + rank)
            loss(student, teacher, 0).backward()
        torch.testing.assert_close(module.center, original.center, rtol=1e-6, atol=1e-7)
    torch.save(module.center, f"{folder}/{rank}")
    dist.destroy_process_group()


def test_centre_is_the_mean_over_ranks(tmp_path):
    mp.spawn(_rank, (2, str(tmp_path)), nprocs=2)
    centers = [torch.load(tmp_path / str(rank)) for rank in range(2)]
    assert torch.equal(*centers)
    expected = torch.zeros(1, K)
    for step in range(4):
        mean = torch.cat([outputs(10 * step + rank)[1] for rank in range(2)]).mean(0, keepdim=True)
        expected = 0.9 * expected + 0.1 * mean
    torch.testing.assert_close(centers[0], expected, rtol=1e-5, atol=1e-6)


def test_errors_say_what_is_accepted():
    module = DINOLoss(*ARGUMENTS)
    student, teacher = outputs(0)
    with pytest.raises(ValueError, match="student_output has 14 rows, which 5 crops do not divide"):
        module(student[:-1], teacher, 0)
    with pytest.raises(ValueError, match=r"teacher_output must be \[2 \* images, 200\].*got \[6, 199\]"):
        module(student, teacher[:, 1:], 0)
    with pytest.raises(ValueError, match="same number of images"):
        module(student, teacher[:4], 0)
    with pytest.raises(ValueError, match="ncrops counts the two global crops too"):
        DINOLoss(K, 1, 0.04, 0.07, 0, 1)
    with pytest.raises(ValueError, match="temperatures must be positive"):
        DINOLoss(K, V, 0.0, 0.0, 0, 1)(student, teacher, 0)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gain", [False, True])
def test_the_default_dtype_does_not_matter(default, gain):
    torch.manual_seed(0)
    student, teacher, center = torch.randn(4, 3, 16), torch.randn(2, 3, 16), torch.randn(50)
    weights = torch.randn(2, 50, 16)
    gains = {name: torch.rand(50) + 0.5 for name in ("student_gain", "teacher_gain")} if gain else {}

    def results():
        rows, weight = student.clone().requires_grad_(), weights[0].clone().requires_grad_()
        loss, mean = linear_dino_loss(
            rows, weight, teacher, weights[1], center, student_temp=0.1, teacher_temp=0.04, **gains
        )
        loss.backward()
        logits = (student @ weights[0].T).requires_grad_()
        plain = dino_loss(logits, teacher @ weights[1].T, center, student_temp=0.1, teacher_temp=0.04)
        plain.backward()
        return loss.detach(), mean, rows.grad, weight.grad, plain.detach(), logits.grad

    expected = results()
    torch.set_default_dtype(default)
    try:
        found = results()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_update_center_asks_for_the_mean_where_logits_are_given():
    loss = DINOLoss(8, 3, 0.04, 0.04, 0, 1)
    logits = torch.randn(4, 8)
    with pytest.raises(ValueError, match=r"takes the mean of the teacher's logits, \[8\]; got \[4, 8\].*mean\(dim=0\)"):
        loss.update_center(logits)
    with pytest.raises(ValueError, match=r"\[3\]; got \[8\]"):
        loss.update_center(logits.mean(dim=0), slice(2, 5))
    loss.update_center(logits.mean(dim=0))
    torch.testing.assert_close(loss.center[0], 0.1 * logits.mean(dim=0))
