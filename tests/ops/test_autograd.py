"""What every operation promises in PyTorch's autograd, whatever it is called through: derivatives that it lacks are
refused by name, recorders see it, compiled code gives eager's numbers and is not compiled anew for each new number."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.autograd.forward_ad as fw
from torch.fx.experimental.proxy_tensor import make_fx

from dino_fast.attention import packed_attention
from dino_fast.loss import DINOLoss, dino_loss, linear_dino_loss
from dino_fast.ops.autograd import is_plain
from dino_fast.ops.dino_loss import dino_loss_reference
from dino_fast.ops.linear.matmul import linear
from dino_fast.ops.linear.mlp import mlp
from dino_fast.ops.linear_dino_loss import linear_dino_loss_reference
from dino_fast.ops.linear_dino_loss.chunked import linear_dino_loss_chunked
from dino_fast.ops.packed_attention import packed_attention_reference

TEMPS = {"student_temp": 0.1, "teacher_temp": 0.04}
V, B, K, D = 4, 3, 50, 16


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


TEACHER, CENTER, ROWS, WEIGHT = drawn(2, B, K), 0.1 * drawn(K, seed=1), drawn(2, B, D, seed=2), drawn(K, D, seed=3)
ENDS = torch.tensor([0, 5, 12], dtype=torch.int32)
PAIRS = torch.ones(2, V).fill_diagonal_(0) / (B * (2 * V - 2))

# name: (operation of one differentiable input, the same in plain PyTorch, that input)
OPERATIONS = {
    "dino_loss": (
        lambda s: dino_loss(s, TEACHER, CENTER, **TEMPS),
        lambda s: dino_loss_reference(s, TEACHER, CENTER, **TEMPS).loss,
        drawn(V, B, K, seed=4),
    ),
    "linear_dino_loss": (
        lambda z: linear_dino_loss(z, WEIGHT, ROWS, WEIGHT, CENTER, **TEMPS)[0],
        lambda z: linear_dino_loss_reference(z, WEIGHT, ROWS, WEIGHT, CENTER, PAIRS, torch.ones(B), **TEMPS).loss,
        drawn(V, B, D, seed=5),
    ),
    "packed_attention": (
        lambda x: packed_attention(x, ENDS, 7).square().sum(),
        lambda x: packed_attention_reference(x, ENDS).square().sum(),
        drawn(12, 3, 2, 8, seed=6),
    ),
}
OPERATORS = {
    "dino_loss": lambda s: torch.ops.dino_fast.dino_loss(s, TEACHER, CENTER, 0.1, 0.04, s.requires_grad)[0],
    "linear_dino_loss": lambda z: torch.ops.dino_fast.linear_dino_loss(
        z, WEIGHT, None, ROWS, WEIGHT, None, CENTER, PAIRS, torch.ones(B), 0.1, 0.04, z.requires_grad
    )[0],
    "packed_attention": lambda x: torch.ops.dino_fast.packed_attention_forward(x, ENDS, 7, "auto")[0].square().sum(),
}
GRADIENT_OPERATORS = {
    "dino_loss": lambda s: torch.ops.dino_fast.dino_loss_gradient(
        s, TEACHER, CENTER, torch.ones(2, 2 + V, B), torch.ones(()), 0.1, 0.04
    ),
    "linear_dino_loss": lambda z: torch.ops.dino_fast.linear_dino_loss_weight_gradient(
        z, WEIGHT, None, ROWS, WEIGHT, None, CENTER, PAIRS, torch.ones(B), torch.ones(2, 2 + V, B), torch.ones(()),
        0.1, 0.04,
    )[0],
    "packed_attention": lambda x: torch.ops.dino_fast.packed_attention_backward(
        torch.ones(12, 2, 8), x, ENDS, torch.ones(12, 2, 8), torch.ones(2, 2, 12), 7, "auto"
    ),
}  # fmt: skip
names = pytest.mark.parametrize("name", OPERATIONS)


# --- derivatives that there are not ---------------------------------------------------------------------------------


def penalty(function, x, how):
    """A gradient penalty, differentiated: by `autograd.grad`, by `backward`, or by `backward` of one input."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(x) + (x**3).sum(), x, create_graph=True)
    if how == "grad":
        return torch.autograd.grad(gradient.square().sum(), x)
    return gradient.square().sum().backward(**({"inputs": [x]} if how == "inputs" else {}))


@pytest.mark.parametrize("how", ["grad", "backward", "inputs"])
@pytest.mark.parametrize("door", [OPERATIONS, OPERATORS], ids=["function", "operator"])
@names
def test_a_second_derivative_is_refused(name, door, how):
    function = door[name][0] if door is OPERATIONS else door[name]
    with pytest.raises(RuntimeError, match=f"{name} has no second derivative"):
        penalty(function, OPERATIONS[name][2], how)


@names
def test_a_gradient_that_was_accumulated_is_not_differentiated_either(name):
    function, _, x = OPERATIONS[name]
    x = x.clone().requires_grad_()
    function(x).backward(create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(x.grad.sum(), x)


@names
def test_a_derivative_through_the_upstream_gradient_is_refused(name):
    function, _, x = OPERATIONS[name]
    x, scale = x.clone().requires_grad_(), torch.tensor(2.0, requires_grad=True)
    (gradient,) = torch.autograd.grad(function(x) * scale, x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(gradient.sum(), scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_a_second_derivative_of_any_logits_is_refused(dtype, inplace):
    leaf = OPERATIONS["dino_loss"][2].clone().to(dtype).requires_grad_()
    loss = dino_loss(leaf * 1, TEACHER, CENTER, **TEMPS, inplace=inplace)
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(gradient.float().square().sum(), leaf)


def test_the_chunked_loss_refuses_what_the_others_do():
    z, w = OPERATIONS["linear_dino_loss"][2].clone().requires_grad_(), WEIGHT.clone().requires_grad_()
    loss, _ = linear_dino_loss_chunked(z * 1, w * 1, ROWS, WEIGHT, CENTER, **TEMPS)
    for x, other in ((z, z), (z, w), (w, z)):
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match="linear_dino_loss_chunked has no second derivative"):
            torch.autograd.grad(gradient.square().sum(), other)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda z: linear_dino_loss_chunked(z, WEIGHT, ROWS, WEIGHT, CENTER, **TEMPS)[0], (z,), (z,))


def test_linear_layers_refuse_a_second_derivative():
    x, weight = drawn(70, 64).double().requires_grad_(), drawn(64, 64, seed=1).double().requires_grad_()
    layer = (weight, torch.zeros(64, dtype=torch.float64), weight, torch.zeros(64, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(mlp(x, *layer).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(gradient.square().sum(), x)


def test_linear_products_refuse_a_second_derivative(monkeypatch):
    import dino_fast.ops.linear.matmul as module

    monkeypatch.setattr(module, "choose", lambda operation, *tensors: "amx")  # the way of its own autograd function
    monkeypatch.setattr(module, "_amx", lambda a, b, bias, add, out: torch.mm(a, b, out=out))
    x, weight = drawn(70, 64).requires_grad_(), drawn(32, 64, seed=1).requires_grad_()
    (gradient,) = torch.autograd.grad(linear(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(gradient.square().sum(), weight)


@pytest.mark.parametrize("door", [OPERATIONS, OPERATORS, GRADIENT_OPERATORS], ids=["function", "operator", "gradient"])
@names
def test_forward_mode_is_refused(name, door):
    function, x = (door[name][0] if door is OPERATIONS else door[name]), OPERATIONS[name][2]
    for jvp in (lambda: torch.func.jvp(function, (x,), (x,)), lambda: torch.func.jacfwd(function)(x)):
        with pytest.raises(NotImplementedError, match=f"{name}.* has no forward-mode derivative"):
            jvp()
    with fw.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        function(fw.make_dual(x, x))
    with fw.dual_level():  # another tensor's tangent
        assert fw.unpack_dual(function(x)).tangent is None


@names
def test_forward_mode_in_compiled_code_is_refused(name):
    function, _, x = OPERATIONS[name]
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, t: torch.func.jvp(function, (x,), (t,))[1], backend="eager")
    with pytest.raises(Exception, match="no forward-mode derivative"):
        compiled(x, x)


@names
def test_transforms_work_or_are_refused(name):
    operator, (_, reference, x) = OPERATORS[name], OPERATIONS[name]
    two = torch.stack([x, 2 * x])
    expected = torch.stack([reference(x), reference(2 * x)])
    torch.testing.assert_close(torch.func.vmap(operator)(two), expected, rtol=1e-5, atol=1e-5)
    grad = torch.func.grad(OPERATIONS[name][0])
    batched = torch.func.vmap(torch.func.grad(operator))
    for transform, given in ((grad, x), (batched, two), (torch.func.jacrev(operator), x)):
        with pytest.raises(NotImplementedError, match=f"{name}.* cannot be differentiated by torch.func"):
            transform(given)


# --- recorders ------------------------------------------------------------------------------------------------------


@names
def test_a_recorder_sees_the_operator(name):
    function, _, x = OPERATIONS[name]
    for mode in ("real", "fake", "symbolic"):
        code = make_fx(function, tracing_mode=mode, _allow_non_fake_inputs=True)(x).code
        assert f"torch.ops.dino_fast.{name}" in code, mode


def test_plain():
    x = torch.zeros(2)
    assert is_plain(x, torch.nn.Parameter(x))
    with fw.dual_level():
        assert not is_plain(x)
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        assert not is_plain(x)
    with torch.device("cpu"):
        assert not is_plain(x)
    torch.func.vmap(lambda row: (row, [] if not is_plain(row) else pytest.fail("a batched tensor"))[0])(x)


# --- compiled code --------------------------------------------------------------------------------------------------


def moving_center(name, dtype):
    """loss(leaf, center) of an operation that keeps the centre for its backward, and a leaf."""
    teacher, rows = TEACHER.to(dtype), ROWS.to(dtype)
    if name == "dino_loss":
        return lambda s, c: (dino_loss(s, teacher, c, **TEMPS), teacher.float().mean((0, 1))), drawn(V, B, K, seed=4)
    leaf = drawn(K, D, seed=7)
    z = drawn(V, B, D, seed=5).to(dtype)
    return lambda w, c: linear_dino_loss(z, w, rows, WEIGHT, c, **TEMPS), leaf


@pytest.mark.parametrize("where", ["inside", "outside"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["dino_loss", "linear_dino_loss"])
def test_compiled_code_keeps_the_centre_of_the_forward(name, dtype, backend, where):
    """The backward comes after the centre's update in place, made within the compiled function or after its call."""
    loss_of, leaf = moving_center(name, dtype)
    torch._dynamo.reset()

    def update(center, mean):
        with torch.no_grad():
            center.mul_(0.9).add_(mean, alpha=0.1)

    def step(x, center):
        loss, mean = loss_of(x, center)
        if where == "inside":
            update(center, mean)
        return loss, mean

    results = []
    for function in (step, torch.compile(step, backend=backend, fullgraph=True)):
        x, center = leaf.clone().to(dtype).requires_grad_(), CENTER.clone()
        loss, mean = function(x, center)
        if where == "outside":
            update(center, mean)
        loss.backward()
        results.append((loss.detach(), x.grad, center))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_a_temperature_an_epoch_is_not_a_compilation_an_epoch():
    module = DINOLoss(K, V, 0.02, 0.07, 10, 12)
    compilations = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    compiled, eager = torch.compile(module, backend=compilations, fullgraph=True), DINOLoss(K, V, 0.02, 0.07, 10, 12)
    assert len(set(module.teacher_temp_schedule)) == 10
    student, teacher = drawn(V * B, K, seed=8), drawn(2 * B, K, seed=9)
    for epoch in range(12):
        losses = [f(student.clone().requires_grad_(), teacher, epoch) for f in (compiled, eager)]
        assert torch.equal(*losses)
    assert compilations.frame_count <= 3  # torch.compile takes an int of 0 and of 1 for constants


@pytest.mark.parametrize("name", ["dino_loss", "linear_dino_loss"])
def test_temperatures_may_be_tensors(name):
    call = {
        "dino_loss": lambda temp: dino_loss(OPERATIONS[name][2], TEACHER, CENTER, student_temp=0.1, teacher_temp=temp),
        "linear_dino_loss": lambda temp: linear_dino_loss(
            OPERATIONS[name][2], WEIGHT, ROWS, WEIGHT, CENTER, student_temp=0.1, teacher_temp=temp
        )[0],
    }[name]
    compilations = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(call, backend=compilations, fullgraph=True)
    for number in (0.04, 0.05, 0.06):
        temp = torch.tensor(number, dtype=torch.float64)
        assert torch.equal(call(number), call(temp)) and torch.equal(call(number), compiled(temp))
    assert compilations.frame_count == 1
    for f in (call, compiled):
        with pytest.raises(ValueError, match="temperatures must be positive"):
            f(torch.tensor(0.0, dtype=torch.float64))


# --- operators called directly --------------------------------------------------------------------------------------


def replaced(arguments, position, value):
    return *arguments[:position], value, *arguments[position + 1 :]


STATISTICS, ONE, LOSS_WEIGHTS = torch.ones(2, 2 + V, B), torch.ones(()), (PAIRS, torch.ones(B))
STUDENT, INNER, QKV = OPERATIONS["dino_loss"][2], OPERATIONS["linear_dino_loss"][2], OPERATIONS["packed_attention"][2]
LINEAR = (INNER, WEIGHT, torch.ones(K), ROWS, WEIGHT, torch.ones(K), CENTER, *LOSS_WEIGHTS)
OUT = torch.ones(12, 2, 8)
CALLS = {
    "dino_loss": ((STUDENT, TEACHER, CENTER), (0.1, 0.04, False)),
    "dino_loss_gradient": ((STUDENT, TEACHER, CENTER, STATISTICS, ONE), (0.1, 0.04)),
    "linear_dino_loss": (LINEAR, (0.1, 0.04, False)),
    "linear_dino_loss_weight_gradient": ((*LINEAR, STATISTICS, ONE), (0.1, 0.04)),
    "packed_attention_forward": ((QKV, ENDS), (7, "auto")),
    "packed_attention_backward": ((OUT, QKV, ENDS, OUT, torch.ones(2, 2, 12)), (7, "auto")),
}


@pytest.mark.parametrize("where", ["cpu", "meta"])
@pytest.mark.parametrize("name", CALLS)
def test_operators_refuse_sizes_and_devices_that_disagree(name, where):
    """Each tensor in turn: shorter, without sizes, of another dtype, and on another device."""
    tensors, rest = CALLS[name]
    operator = getattr(torch.ops.dino_fast, name)
    tensors = tuple(x.to(where) for x in tensors)
    operator(*tensors, *rest)
    for i, x in enumerate(tensors):
        if x is tensors[-1] and name.endswith("gradient"):  # the upstream gradient, one number
            wrong = [torch.ones(2, device=where), torch.ones((), dtype=torch.int64, device=where)]
        elif x.dtype == torch.int32:
            wrong = [x[None], x.long(), *([x[:-1]] if where == "cpu" else [])]
        else:
            wrong = [x[:-1] if x.ndim == 1 else x[:, :-1], x.flatten()[0], x.long()]
        wrong.append(torch.empty_like(x, device="meta" if where == "cpu" else "cpu"))
        for value in wrong:
            if name == "packed_attention_backward" and i == 0 and value.dtype == torch.int64:
                continue
            with pytest.raises(ValueError, match=name.rsplit("_", 1)[0] if "attention" in name else "dino_loss: "):
                operator(*replaced(tensors, i, value), *rest)


def test_operators_check_the_temperatures():
    for name in ("dino_loss", "dino_loss_gradient", "linear_dino_loss", "linear_dino_loss_weight_gradient"):
        tensors, (_, *rest) = CALLS[name]
        with pytest.raises(ValueError, match="temperatures must be positive"):
            getattr(torch.ops.dino_fast, name)(*tensors, 0.0, *rest)


@pytest.mark.parametrize("changed", [1 << 20, int(ENDS[1]) - 1], ids=["outside", "other sequences"])
def test_ends_that_numpy_changes_before_the_backward_are_those_of_the_forward(changed):
    gradients = []
    for value in (int(ENDS[1]), changed):
        qkv, ends = QKV.clone().requires_grad_(), ENDS.clone()
        loss = packed_attention(qkv, ends, 7).square().sum()
        ends.numpy()[1] = value
        loss.backward()
        gradients.append(qkv.grad)
    assert torch.equal(*gradients)


# --- inference mode -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("door", ["function", "operator"])
def test_what_inference_mode_made_is_taken(door, dtype):
    mode = functools.partial(torch.device, "cpu") if door == "operator" else torch.enable_grad
    with torch.inference_mode():
        teacher, center, rows, weight, ends = TEACHER.to(dtype), CENTER * 1, ROWS.to(dtype), WEIGHT * 1, ENDS * 1
        gain = torch.ones(K)
    options = {"student_gain": torch.ones(K), "teacher_gain": gain}
    cases = (
        (lambda s, *fixed: dino_loss(s, *fixed, **TEMPS), STUDENT, (teacher, center)),
        (lambda z, *fixed: linear_dino_loss(z, WEIGHT, *fixed, **TEMPS, **options)[0], INNER, (rows, weight, center)),
        (lambda w, z, *fixed: linear_dino_loss(z, w, *fixed, **TEMPS)[0], WEIGHT, (rows * 1, rows, weight, center)),
        (lambda x, ends: packed_attention(x, ends, 7).float().square().sum(), QKV, (ends,)),
    )
    for function, x, made in cases:
        gradients = []
        for fixed in (made, [t.clone() for t in made]):
            leaf = x.clone().to(dtype).requires_grad_()
            with mode():
                loss = function(leaf, *fixed) * 3
            loss.backward()
            gradients.append(leaf.grad)
        assert all(t.is_inference() for t in made[-1:]) and torch.equal(*gradients)


def test_nothing_is_wanted_in_inference_mode():
    with torch.inference_mode():
        for function, _, x in OPERATIONS.values():
            assert function(x.clone()).isfinite()
