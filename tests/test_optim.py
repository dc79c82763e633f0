"""AdamWEMA against clipping, torch.optim.AdamW and an EMA loop; its state, its errors, mixed precision and DTensors."""

from __future__ import annotations

import copy
import math
import os
import pickle
import subprocess
import sys
import weakref
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from dino_fast.optim import AdamWEMA, ema_update

SHAPES = [(300, 70), (5,), (1,), (), (0, 3), (40, 9)]
pairs = partial(zip, strict=True)


@pytest.fixture(autouse=True, params=["native", "reference"])
def backend(request, monkeypatch):
    monkeypatch.setenv("DINO_FAST_BACKEND", f"multi_tensor={request.param}")
    return request.param


def parameters(dtype=torch.float32, seed=0, shapes=SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def copies_of(params: list[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in params]


def set_gradients(params: list[Tensor], step: int, skip: tuple[int, ...] = (), scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for i, p in enumerate(params):
        grad = torch.randn(p.shape, generator=generator)
        p.grad = None if i in skip else (grad * scale).to(p.dtype)


def clip_each(params: list[Tensor], largest: float) -> None:
    for p in params:
        if p.grad is not None:
            coefficient = largest / (p.grad.norm() + 1e-6)
            if coefficient < 1:
                p.grad.mul_(coefficient)


def groups_of(params: list[Tensor]) -> list[dict]:
    return [{"params": params[:2] + params[5:]}, {"params": params[2:5], "weight_decay": 0.0}]


def in_group_order(tensors: list[Tensor]) -> list[Tensor]:
    return tensors[:2] + tensors[5:] + tensors[2:5]


def assert_close(got: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in pairs(got, wanted):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clip_mode", [None, "parameter", "global"])
def test_many_steps_equal_clip_adamw_and_ema_loop(clip_mode):
    params, theirs = parameters(), parameters()
    teacher, their_teacher = copies_of(params), copies_of(params)
    options = {} if clip_mode is None else {"clip_grad": 2.0, "clip_mode": clip_mode}
    ours = AdamWEMA(groups_of(params), in_group_order(teacher), **options)
    adamw = torch.optim.AdamW(groups_of(theirs), lr=1e-3, weight_decay=0.04)
    for step in range(30):
        lr, weight_decay, momentum = 1e-2 * (step + 1) / 30, 0.04 + 0.01 * step, 0.9 + 0.1 * step / 30
        for optimizer in (ours, adamw):
            for i, group in enumerate(optimizer.param_groups):
                group["lr"], group["weight_decay"] = lr, weight_decay if i == 0 else 0.0
        skip = (5,) if step < 10 else ()  # as the frozen last layer
        set_gradients(params, step, skip)
        set_gradients(theirs, step, skip)
        ours.step(momentum=momentum)
        if clip_mode == "parameter":
            clip_each(theirs, 2.0)
        elif clip_mode == "global":
            torch.nn.utils.clip_grad_norm_(theirs, 2.0)
        adamw.step()
        for t, p in pairs(their_teacher, theirs):
            t.mul_(momentum).add_((1 - momentum) * p.detach())
    assert_close(params, theirs)
    assert_close(teacher, their_teacher)
    assert ours.state[params[5]]["step"] == 20 and ours.state[params[0]]["step"] == 30


def test_float64_equals_torch_to_its_last_digits():
    params, theirs = parameters(torch.float64), parameters(torch.float64)
    teacher = copies_of(params)
    ours, adamw = AdamWEMA(params, teacher, lr=1e-2), torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.04)
    os.environ.pop("DINO_FAST_BACKEND")
    for step in range(5):
        set_gradients(params, step)
        set_gradients(theirs, step)
        ours.step(momentum=0.9)
        adamw.step()
    for a, b in pairs(params, theirs):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_without_gradient_only_the_teacher_moves():
    params = parameters()
    teacher = [torch.zeros_like(p) for p in copies_of(params)]
    before = copies_of(params)
    optimizer = AdamWEMA(params, teacher)
    optimizer.step(momentum=0.75)
    assert all(torch.equal(p.detach(), b) for p, b in pairs(params, before))
    assert_close(teacher, [0.25 * b for b in before])
    assert not optimizer.state


def test_gradients_are_freed_before_the_next_forward():
    params = parameters()
    optimizer = AdamWEMA(params, copies_of(params), clip_grad=1.0)
    set_gradients(params, 0)
    gradients = [weakref.ref(p.grad) for p in params]
    optimizer.step(momentum=0.9)
    optimizer.zero_grad()
    assert not any(gradient() is not None for gradient in gradients)


def test_without_momentum_the_teacher_stays():
    params = parameters()
    teacher = copies_of(params)
    optimizer = AdamWEMA(params, teacher)
    set_gradients(params, 0)
    before = copies_of(params)
    with pytest.warns(UserWarning, match=r"momentum=0\.996.*group\['momentum'\]") as told:
        optimizer.step()
        optimizer.step()
    assert len(told) == 1
    assert all(torch.equal(t, b) for t, b in pairs(teacher, before))
    assert not torch.equal(params[0], before[0])


@pytest.mark.filterwarnings("error")
def test_the_groups_momentum_is_the_default():
    params, theirs = parameters(), parameters()
    teacher, their_teacher = copies_of(params), copies_of(params)
    optimizer = AdamWEMA(groups_of(params), in_group_order(teacher), momentum=0.9)
    adamw = torch.optim.AdamW(groups_of(theirs), lr=1e-3, weight_decay=0.04)
    assert [group["momentum"] for group in optimizer.param_groups] == [0.9, 0.9] and "momentum=0.9" in repr(optimizer)
    # Equal in both groups, then another, then different ones, which change while they stay different; then overridden.
    schedule = [(0.9, 0.9), (0.8, 0.8), (0.7, 0.2), (0.6, 0.3), (0.3, 0.6), (0.5, 0.5)]
    for step, momenta in enumerate(schedule):
        given = {}
        for group, momentum in pairs(optimizer.param_groups, momenta):
            group["momentum"] = torch.tensor(momentum, dtype=torch.float64) if step == 3 else momentum
        if step == 5:
            given, momenta = {"momentum": 0.1}, (0.1, 0.1)
        set_gradients(params, step, skip=(1, 3))
        set_gradients(theirs, step, skip=(1, 3))
        optimizer.step(**given)
        adamw.step()
        for (i, t), p in pairs(enumerate(their_teacher), theirs):
            momentum = momenta[0 if i in (0, 1, 5) else 1]
            t.mul_(momentum).add_((1 - momentum) * p.detach())
        assert_close(teacher, their_teacher)
    assert_close(params, theirs)


def test_only_a_group_with_a_momentum_has_a_moving_teacher():
    params = parameters()
    teacher = [torch.zeros_like(p) for p in copies_of(params)]
    first, second = groups_of(params)
    optimizer = AdamWEMA([{**first, "momentum": 0.5}, second], in_group_order(teacher))
    with pytest.warns(UserWarning, match="the teacher stays") as told:
        optimizer.step()
        optimizer.step()
    assert len(told) == 1
    assert_close(teacher, [0.75 * p.detach() if i in (0, 1, 5) else torch.zeros_like(p) for i, p in enumerate(params)])


def test_betas_in_tensors_that_change_are_noticed():
    params = parameters()
    optimizer = AdamWEMA(params, None, betas=(0.9, 0.999))
    betas = torch.tensor(0.9), torch.tensor(0.999)
    optimizer.param_groups[0]["betas"] = betas
    for step, beta in enumerate((0.9, 0.5)):
        betas[0].fill_(beta)
        moment = optimizer.state[params[0]].get("exp_avg", torch.zeros_like(params[0])).clone()
        set_gradients(params, step)
        optimizer.step()
        assert_close([optimizer.state[params[0]]["exp_avg"]], [torch.lerp(moment, params[0].grad, 1 - beta)])


def test_parameters_that_change_their_group_are_noticed():
    params = [torch.zeros(3, requires_grad=True) for _ in range(3)]
    optimizer = AdamWEMA([{"params": params[:1], "lr": 0.0}, {"params": params[1:], "lr": 1.0}], None)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones(3)
        optimizer.step()
        first, second = optimizer.param_groups
        first["params"], second["params"] = params[:2], params[2:]
    torch.testing.assert_close(torch.stack(params).detach().mean(1).round(decimals=1), torch.tensor([0.0, -1.0, -2.0]))


def test_groups_and_teachers_that_no_longer_correspond_are_refused():
    params = parameters()
    optimizer = AdamWEMA(groups_of(params), in_group_order(copies_of(params)), momentum=0.9)
    del optimizer.param_groups[1]
    with pytest.raises(ValueError, match="1 param_groups and 2 teacher_params"):
        optimizer.step()


def test_what_changes_between_steps_is_noticed():
    params = parameters()
    teacher = copies_of(params)
    optimizer = AdamWEMA(params, teacher, lr=1e-2)
    for step in range(6):
        set_gradients(params, step)
        if step == 1:
            teacher[0] = optimizer.teacher_params[0][0] = teacher[0].clone()
        if step == 2:
            optimizer.state[params[0]]["exp_avg"] = torch.full_like(params[0], 1e6)
        if step == 3:
            with torch.no_grad():
                params[1].data = params[1].data.clone()
        if step == 4:
            optimizer.param_groups[0]["betas"] = (0.5, 0.6)
            optimizer.param_groups[0]["eps"] = 10.0
        if step == 5:
            extra = [torch.ones(3, requires_grad=True), torch.zeros(3)]
            extra[0].grad = torch.ones(3)
            optimizer.add_param_group({"params": extra[:1], "teacher_params": extra[1:]})
        before, moment = copies_of(params + teacher), optimizer.state[params[1]].get("exp_avg", torch.zeros(5)).clone()
        optimizer.step(momentum=0.5)
        assert all(not torch.equal(t, b) for t, b in pairs(params + teacher, before) if t.numel())
        if step == 2:
            assert optimizer.state[params[0]]["exp_avg"].min() > 8e5
        if step == 4:
            torch.testing.assert_close(optimizer.state[params[1]]["exp_avg"], 0.5 * moment + 0.5 * params[1].grad)
    assert optimizer.state[extra[0]]["step"] == 1 and (extra[1] > 0.4).all()


# ---- state ----


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}])
def test_state_loads_from_and_into_adamw(options):
    params, theirs = parameters(), parameters()
    adamw = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1, **options)
    for step in range(3):
        set_gradients(theirs, step)
        adamw.step()
    with torch.no_grad():
        for p, q in pairs(params, theirs):
            p.copy_(q)
    ours = AdamWEMA(params, copies_of(params))
    ours.load_state_dict(copy.deepcopy(adamw.state_dict()))
    assert ours.param_groups[0]["lr"] == 1e-2 and len(ours.teacher_params[0]) == len(SHAPES)
    for step in range(3, 6):
        for p, optimizer, given in ((params, ours, {"momentum": 0.9}), (theirs, adamw, {})):
            set_gradients(p, step)
            optimizer.step(**given)
    assert_close(params, theirs)

    again = torch.optim.AdamW(theirs)
    again.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert ours.state_dict()["param_groups"][0].keys() == adamw.state_dict()["param_groups"][0].keys()
    for step in range(6, 9):
        for p, optimizer, given in ((params, ours, {"momentum": 0.9}), (theirs, again, {})):
            set_gradients(p, step)
            optimizer.step(**given)
    assert_close(params, theirs)


def test_momentum_is_saved_and_a_state_dict_without_one_leaves_it():
    def made(momentum):
        params = parameters()
        return AdamWEMA(params, copies_of(params), momentum=momentum)

    saved, none = made(0.7).state_dict(), made(None).state_dict()
    assert saved["param_groups"][0]["momentum"] == 0.7 and "momentum" not in none["param_groups"][0]
    for given, state, expected in ((0.9, saved, 0.7), (0.9, none, 0.9), (None, saved, 0.7), (None, none, None)):
        optimizer = made(given)
        optimizer.load_state_dict(state)
        assert optimizer.param_groups[0].get("momentum") == expected
    torch.optim.AdamW(parameters()).load_state_dict(saved)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_a_copied_optimizer_goes_on_the_same(copied):
    params = parameters()
    optimizer = AdamWEMA(
        groups_of(params),
        in_group_order(copies_of(params)),
        momentum=0.9,
        bf16_params=[torch.empty_like(p, dtype=torch.bfloat16) for p in in_group_order(params)],
    )
    set_gradients(params, 0)
    optimizer.step()
    other = copied(optimizer)
    others = [p for group in other.param_groups for p in group["params"]]
    for p, q in pairs(in_group_order(params), others):
        q.grad = p.grad.clone()
    optimizer.step()
    other.step()
    assert all(torch.equal(p, q) and p is not q for p, q in pairs(in_group_order(params), others))
    for name in ("teacher_params", "bf16_params", "bf16_teacher"):
        for some, more in pairs(getattr(optimizer, name), getattr(other, name)):
            assert all(torch.equal(a, b) and a is not b for a, b in pairs(some, more))


def test_named_parameters_are_taken():
    student, teacher = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    optimizer = AdamWEMA(student.named_parameters(), teacher.named_parameters(), momentum=0.0)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    optimizer.step()
    assert_close(list(teacher.parameters()), list(student.parameters()))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_step_that_makes_the_state_moves_nothing(dtype):
    """As torch.distributed.checkpoint makes it: zero gradients, learning rates of 0, `step()`."""
    params = parameters(dtype)
    before, teacher = copies_of(params), [t + 1 for t in copies_of(params)]
    teacher_before = copies_of(teacher)
    for momentum in (None, 0.5):
        optimizer = AdamWEMA(params, teacher, lr=0.0, momentum=momentum)
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        assert all(torch.equal(a, b) for a, b in pairs(params + teacher, before + teacher_before))
        names = {"step", "exp_avg", "exp_avg_sq"} | ({"master", "teacher_master"} if dtype == torch.bfloat16 else set())
        assert all(optimizer.state[p].keys() == names for p in params)
    optimizer.step()  # with a state it is a step like any other, and moves the teacher
    assert not torch.equal(teacher[0], teacher_before[0])


def test_state_dict_does_not_hold_the_teacher():
    params = parameters()
    optimizer = AdamWEMA(params, copies_of(params), bf16_params=[p.detach().bfloat16() for p in params])
    set_gradients(params, 0)
    optimizer.step(momentum=0.9)
    state = optimizer.state_dict()
    held = sum(t.numel() for s in state["state"].values() for t in s.values())
    assert held == sum(2 * p.numel() + 1 for p in params)
    assert not any(isinstance(v, (list, Tensor)) and k != "params" for k, v in state["param_groups"][0].items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_run_has_the_same_bits(dtype):
    def steps(params, optimizer, first, last):
        for step in range(first, last):
            set_gradients(params, step, skip=(0,) if step % 2 else ())
            optimizer.step(momentum=0.99)

    params = parameters(dtype)
    teacher = copies_of(params)
    optimizer = AdamWEMA(params, teacher, lr=1e-2, clip_grad=1.0)
    steps(params, optimizer, 0, 4)
    state, weights = copy.deepcopy(optimizer.state_dict()), (copies_of(params), copies_of(teacher))
    steps(params, optimizer, 4, 8)

    params2, teacher2 = [w.clone().requires_grad_() for w in weights[0]], [w.clone() for w in weights[1]]
    optimizer2 = AdamWEMA(params2, teacher2, lr=1e-2, clip_grad=1.0)
    optimizer2.load_state_dict(state)
    steps(params2, optimizer2, 4, 8)
    assert all(torch.equal(a, b) for a, b in pairs(params + teacher, params2 + teacher2))


def test_deep_copy_and_repr():
    params = parameters()
    optimizer = copy.deepcopy(AdamWEMA(params, copies_of(params), clip_grad=3.0))
    assert optimizer.clip_grad == 3.0 and len(repr(optimizer)) < 200


# ---- bfloat16 ----


def test_bf16_copies_follow_student_and_teacher():
    params = parameters()
    teacher = copies_of(params)
    shadows = [torch.full_like(p, math.nan, dtype=torch.bfloat16, requires_grad=True) for p in copies_of(params)]
    teacher_shadows = [torch.full_like(p, math.nan, dtype=torch.bfloat16) for p in teacher]
    optimizer = AdamWEMA(params, teacher, bf16_params=shadows, bf16_teacher=teacher_shadows)
    for step in range(3):
        for s, t in ((shadows, params), (teacher_shadows, teacher)):
            assert all(torch.equal(a, b.bfloat16()) for a, b in pairs(s, t))
        set_gradients(params if step else shadows, step, skip=(5,))
        optimizer.step(momentum=0.5)
        optimizer.zero_grad()
        assert all(t.grad is None for t in params + shadows)
    assert optimizer.state[params[0]]["step"] == 3 and params[5] not in optimizer.state


def test_bf16_modules_keep_float32_masters():
    params, exact = (
        parameters(torch.bfloat16),
        [p.float().requires_grad_() for p in copies_of(parameters(torch.bfloat16))],
    )
    teacher, exact_teacher = copies_of(params), copies_of(exact)
    optimizer = AdamWEMA(params, teacher, lr=1e-4)
    wide = AdamWEMA(exact, exact_teacher, lr=1e-4)
    for step in range(20):
        set_gradients(params, step, skip=(1,))
        for p, q in pairs(params, exact):
            q.grad = None if p.grad is None else p.grad.float()
        optimizer.step(momentum=0.996)
        wide.step(momentum=0.996)
    assert_close(
        [optimizer.state[p]["master"] for p in params if p.grad is not None], [exact[i] for i in (0, 2, 3, 4, 5)]
    )
    assert_close([optimizer.state[p]["teacher_master"] for p in params], exact_teacher)
    assert all(torch.equal(a, b.bfloat16()) for a, b in pairs(params + teacher, exact + exact_teacher))

    plain = {k: v for k, v in optimizer.state_dict().items()}
    for state in plain["state"].values():
        state.pop("master", None)
        state.pop("teacher_master", None)
    optimizer.load_state_dict(plain)
    set_gradients(params, 0)
    optimizer.step(momentum=0.996)
    assert all(optimizer.state[p]["master"].dtype == torch.float32 for p in params)
    assert all(optimizer.state[p]["exp_avg"].dtype == torch.float32 for p in params)


# ---- mixed precision ----


@pytest.mark.parametrize("unscaled_first", [False, True])
def test_grad_scaler(unscaled_first):
    params, theirs = parameters(), parameters()
    teacher, their_teacher = copies_of(params), copies_of(params)
    ours = AdamWEMA(params, teacher, lr=1e-2, clip_grad=0.5)
    adamw = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.04)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    scaler.scale(torch.ones(()))  # creates the scale
    scales = []
    for step in range(6):
        overflow = step == 3
        scale = scaler.get_scale()
        set_gradients(params, step, scale=scale)
        set_gradients(theirs, step)
        if overflow:
            params[0].grad[7, 7] = math.inf
        if unscaled_first:
            scaler.unscale_(ours)
        scaler.step(ours, momentum=0.9)
        scaler.update()
        scales.append(scaler.get_scale())
        if not overflow:
            clip_each(theirs, 0.5)
            adamw.step()
        for t, p in pairs(their_teacher, theirs):
            t.mul_(0.9).add_(0.1 * p.detach())
    assert scales[2] == 1024.0 and scales[3] == 512.0
    assert_close(params, theirs)
    assert_close(teacher, their_teacher)
    assert ours.state[params[0]]["step"] == 5


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("clip_mode", ["parameter", "global"])
def test_non_finite_gradients_show(bad, clip_mode):
    params = parameters()
    teacher = copies_of(params)
    set_gradients(params, 0)
    params[1].grad[2] = bad
    AdamWEMA(params, teacher, clip_grad=1.0, clip_mode=clip_mode).step(momentum=0.9)
    assert not params[1][2].isfinite() and not teacher[1][2].isfinite()
    if clip_mode == "parameter":
        assert params[0].isfinite().all() and params[1][:2].isfinite().all()
    elif math.isnan(bad):
        assert params[0].isnan().all()  # as clip_grad_norm_: a NaN norm spoils them all


# ---- errors ----


def test_errors_name_what_is_wrong():
    params = parameters()
    teacher = copies_of(params)
    with pytest.raises(ValueError, match="teacher_params has 5 tensors for 6 parameters"):
        AdamWEMA(params, teacher[:-1])
    with pytest.raises(ValueError, match=r"teacher_params\[0\] is \(40, 9\)"):
        AdamWEMA(params, teacher[::-1])
    with pytest.raises(ValueError, match="on meta"):
        AdamWEMA(params, [t.to("meta") for t in teacher])
    with pytest.raises(TypeError, match=r"torch\.float16"):
        AdamWEMA([p.detach().half() for p in params], None)
    with pytest.raises(TypeError, match="the teacher must be"):
        AdamWEMA(params, [t.half() for t in teacher])
    with pytest.raises(TypeError, match="bfloat16 ones of float32"):
        AdamWEMA(params, teacher, bf16_params=teacher)
    with pytest.raises(ValueError, match="parameter, global"):
        AdamWEMA(params, teacher, clip_mode="norm")
    with pytest.raises(ValueError, match="clip_grad"):
        AdamWEMA(params, teacher, clip_grad=-1.0)
    with pytest.raises(ValueError, match="no parameters"):
        AdamWEMA([], [])
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        AdamWEMA(params, teacher).step(momentum=1.5)
    with pytest.raises(ValueError, match="there is none"):
        AdamWEMA(params, None).step(momentum=0.5)
    for option, value in (
        ("amsgrad", True), ("maximize", True), ("differentiable", True), ("decoupled_weight_decay", False),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"a group has {option}={value}"):
            AdamWEMA([{"params": params, option: value}], teacher)
        state = torch.optim.AdamW(params).state_dict()
        state["param_groups"][0][option] = value
        with pytest.raises(ValueError, match=f"the state dict has a group with {option}={value}"):
            AdamWEMA(params, teacher).load_state_dict(state)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        AdamWEMA(params, teacher, momentum=-0.1)
    with pytest.raises(ValueError, match="there is none"):
        AdamWEMA(params, None, momentum=0.5)
    optimizer = AdamWEMA(params, teacher)
    optimizer.param_groups[0]["momentum"] = math.nan
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        optimizer.step()
    for momentum in (torch.ones(2), torch.ones((), device="meta")):
        with pytest.raises(ValueError, match="a number, or a tensor of one on the CPU"):
            ema_update(teacher, params, momentum)
    with pytest.raises(ValueError, match="teacher has 6 tensors but student has 5"):
        ema_update(teacher, params[:-1], 0.5)


# ---- ema_update, compile, DTensor ----


def test_ema_update_takes_modules_parameters():
    student, teacher = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    wanted = [0.9 * t.detach() + 0.1 * p.detach() for t, p in pairs(teacher.parameters(), student.parameters())]
    ema_update(teacher.parameters(), student.parameters(), 0.9)
    assert_close(list(teacher.parameters()), wanted)
    ema_update([], [], 0.5)


def test_ema_update_compiles_without_a_break():
    teacher, student = copies_of(parameters(seed=1)), copies_of(parameters(seed=2))
    wanted = [torch.lerp(t, p, 0.25) for t, p in pairs(teacher, student)]
    torch.compile(ema_update, fullgraph=True, backend="aot_eager")(teacher, student, 0.75)
    assert_close(teacher, wanted)


@pytest.mark.parametrize("kind", ["number", "tensor"])
def test_a_compiled_ema_update_takes_any_momentum(kind):
    student = copies_of(parameters(seed=2))
    counter = CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    update = torch.compile(ema_update, fullgraph=True, backend=counter)
    for step in range(12):
        teacher = copies_of(parameters(seed=1))
        momentum = 0.9 + 0.008 * step
        wanted = [torch.lerp(t, p, 1 - momentum) for t, p in pairs(teacher, student)]
        update(teacher, student, momentum if kind == "number" else torch.tensor(momentum, dtype=torch.float64))
        assert_close(teacher, wanted)
    assert counter.frame_count <= 2  # with a constant momentum, and with any
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        update(teacher, student, 1.5 if kind == "number" else torch.tensor(1.5))


def test_a_compiled_loop_compiles_no_step():
    model, eager_model = torch.nn.Linear(6, 4), torch.nn.Linear(6, 4)
    eager_model.load_state_dict(model.state_dict())
    teacher, eager_teacher = copy.deepcopy(model), copy.deepcopy(model)
    ours, eager = (
        AdamWEMA(m.parameters(), t.parameters(), lr=1e-2) for m, t in ((model, teacher), (eager_model, eager_teacher))
    )

    def step(model, optimizer, x, momentum):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step(momentum=momentum)

    counter = CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    compiled = torch.compile(step, backend=counter)
    for i in range(12):
        x = torch.randn(3, 6, generator=torch.Generator().manual_seed(i))
        for optimizer in (ours, eager):
            optimizer.param_groups[0]["lr"] = 1e-2 / (i + 1)
        compiled(model, ours, x, 0.9 + 0.008 * i)
        step(eager_model, eager, x, 0.9 + 0.008 * i)
    assert_close([*model.parameters(), *teacher.parameters()], [*eager_model.parameters(), *eager_teacher.parameters()])
    assert counter.frame_count <= 3


DTENSOR_RANK = """
import os, torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from dino_fast.optim import AdamWEMA, ema_update

torch.set_num_threads(1)
mesh = init_device_mesh("cpu", (2,))
generator = torch.Generator().manual_seed(0)
shapes = [(7, 5), (1, 4), (6,), (9, 2)]  # uneven, and empty on the second rank
full = [torch.randn(s, generator=generator) for s in shapes]
places = [[Shard(0)], [Shard(0)], [Replicate()], [Shard(1)]]

def spread(tensors):
    return [distribute_tensor(t.clone(), mesh, p) for t, p in zip(tensors, places)]

for mode in ("parameter", "global"):
    params = [p.requires_grad_() for p in spread(full)]
    teacher = spread(full)
    whole, whole_teacher = [t.clone().requires_grad_() for t in full], [t.clone() for t in full]
    sharded = AdamWEMA(params, teacher, lr=1e-2, clip_grad=0.7, clip_mode=mode)
    single = AdamWEMA(whole, whole_teacher, lr=1e-2, clip_grad=0.7, clip_mode=mode)
    for step in range(4):
        grads = [torch.randn(s, generator=generator) for s in shapes]
        for p, q, g, place in zip(params, whole, grads, places):
            p.grad, q.grad = distribute_tensor(g, mesh, place), g
        sharded.step(momentum=0.9)
        single.step(momentum=0.9)
    ema_update(teacher, params, 0.5)
    ema_update(whole_teacher, whole, 0.5)
    for a, b in zip(params + teacher, whole + whole_teacher):
        torch.testing.assert_close(a.full_tensor(), b, rtol=1e-6, atol=1e-6)
dist.barrier()
# A thread of gloo may only now let go of the last result. It asks for the interpreter, and an exit that is already
# taking that down kills it, and the process with it.
os._exit(0)
"""


def test_dtensors_on_two_ranks(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(DTENSOR_RANK)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    result = subprocess.run(launcher, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
