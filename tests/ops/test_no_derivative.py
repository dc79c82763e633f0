"""The operations without a derivative, multi_crop and those of multi_tensor, under whatever PyTorch puts around them.

Forward mode, `torch.func` and gradients are refused by name, never taken for zero; recorders and tensor subclasses see
the operator, so that no native code reads through the pointer of a tensor without memory.
"""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as fw
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map

from dino_fast.augment import MultiCrop
from dino_fast.ops.multi_crop import multi_crop, multi_crop_into
from dino_fast.optim import AdamWEMA, ema_update

CROPS = MultiCrop(global_size=8, local_size=4, n_local=1)
IMAGES = [torch.randint(0, 256, (3, 20, 30), generator=torch.Generator().manual_seed(i)).byte() for i in range(2)]
TABLE = CROPS.crop_table(CROPS.sample(2, torch.Generator().manual_seed(0)), [(20, 30)] * 2)
MEAN, STD = (x.flatten() for x in CROPS.statistics(3))
EXPECTED = CROPS.crop(IMAGES, TABLE)


def crop(mean):
    return multi_crop(IMAGES, *TABLE, 2, [8, 8], [4, 4], mean, STD)[0]


def crop_into(mean, images=IMAGES, out=None):
    out = out or tuple(torch.zeros(x.shape) for x in EXPECTED)
    multi_crop_into(out, images, *TABLE, mean, STD)
    return out[0]


def move_teacher(student):
    teacher = torch.full((3,), 2.0)
    ema_update([teacher], [student], 0.9)
    return teacher


def norms(gradient):
    return torch.ops.dino_fast.grad_norms([gradient])


def step(gradient, clip_grad=0.0):
    param, teacher = torch.nn.Parameter(torch.ones(3)), torch.zeros(3)
    optimizer = AdamWEMA([param], [teacher], clip_grad=clip_grad)
    param.grad = gradient
    optimizer.step(momentum=0.5)
    return teacher


# operator: (a function of one float tensor, that tensor)
CALLS = {
    "multi_crop": (crop, MEAN),
    "multi_crop, into": (crop_into, MEAN),
    "ema_update": (move_teacher, torch.ones(3)),
    "grad_norms": (norms, torch.ones(3)),
    "grad_norms, clipped": (lambda g: step(g, clip_grad=1.0), torch.ones(3)),
    "adamw_ema": (step, torch.ones(3)),
}
names = pytest.mark.parametrize("name", CALLS)


@names
def test_forward_mode_is_refused(name):
    (function, x), operator = CALLS[name], name.partition(",")[0]
    with pytest.raises(NotImplementedError, match=f"{operator} has no forward-mode derivative"):
        torch.func.jvp(function, (x,), (x,))
    with fw.dual_level(), pytest.raises(NotImplementedError, match=f"{operator} has no forward-mode derivative"):
        function(fw.make_dual(x, x.clone()))
    with fw.dual_level():  # another tensor's tangent
        assert torch.equal(fw.unpack_dual(function(x)).primal, function(x))


@names
def test_vmap_is_refused(name):
    (function, x), operator = CALLS[name], name.partition(",")[0]
    with pytest.raises(RuntimeError, match=f"dino_fast::{operator}"):
        torch.func.vmap(function)(torch.stack([x, 2 * x]))


@pytest.mark.parametrize("name", ["multi_crop", "multi_crop, into", "grad_norms"])
def test_gradients_are_refused(name):
    (function, x), operator = CALLS[name], name.partition(",")[0]
    with pytest.raises(NotImplementedError, match=f"{operator} cannot be differentiated by torch.func"):
        torch.func.grad(lambda x: function(x).sum())(x)
    if "into" not in name:
        with pytest.raises(RuntimeError, match=f"backward through dino_fast.{operator}"):
            function(x.clone().requires_grad_()).sum().backward()


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@names
def test_a_recorder_sees_the_operator(name, mode):
    function, x = CALLS[name]
    code = make_fx(lambda x: function(x), tracing_mode=mode, _allow_non_fake_inputs=True)(x).code
    assert f"torch.ops.dino_fast.{name.partition(',')[0]}" in code


class Wrapped(torch.Tensor):
    """A tensor without memory of its own, as DTensor and quantized tensors are."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        args, kwargs = tree_map(lambda x: x.inner if isinstance(x, cls) else x, (args, kwargs or {}))
        return function(*args, **kwargs)


@names
def test_subclasses_without_memory_give_the_same(name):
    function, x = CALLS[name]
    assert torch.equal(function(Wrapped(x)), function(x))


def test_crops_are_read_from_and_written_to_subclasses_without_memory():
    assert torch.equal(crop_into(MEAN, images=[Wrapped(x) for x in IMAGES]), EXPECTED[0])
    inner = tuple(torch.zeros(x.shape) for x in EXPECTED)
    crop_into(MEAN, out=tuple(Wrapped(x) for x in inner))
    assert all(map(torch.equal, inner, EXPECTED))


def test_crops_are_not_written_where_a_gradient_is_recorded():
    out = tuple(torch.zeros(x.shape, requires_grad=True) for x in EXPECTED)
    with pytest.raises(RuntimeError, match="no_grad"):
        crop_into(MEAN, out=out)
    with torch.no_grad():
        assert torch.equal(crop_into(MEAN, out=out), EXPECTED[0])


@pytest.mark.parametrize("position", [0, 1])
def test_operators_in_place_are_refused_where_a_gradient_is_recorded(position):
    tensors = [torch.ones(3), torch.ones(3)]
    tensors[position].requires_grad_()
    teacher, student = tensors
    with pytest.raises(RuntimeError, match="ema_update writes in place and has no derivative"):
        torch.ops.dino_fast.ema_update([teacher], [student], 0.9, [])
    with torch.no_grad():
        torch.ops.dino_fast.ema_update([teacher], [student], 0.9, [])


@pytest.mark.parametrize("write", ["multi_crop", "ema_update", "step"])
def test_a_backward_that_needs_what_was_overwritten_is_refused(write):
    x = torch.ones(EXPECTED[0].shape if write == "multi_crop" else (3,))
    factor = torch.ones(x.shape, requires_grad=True)
    loss = (factor * x).sum()
    if write == "multi_crop":
        crop_into(MEAN, out=(x, torch.zeros(EXPECTED[1].shape)))
    elif write == "ema_update":
        ema_update([x], [torch.zeros(3)], 0.9)
    else:
        param = torch.nn.Parameter(torch.ones(3))
        optimizer = AdamWEMA([param], [x])
        param.grad = torch.ones(3)
        optimizer.step(momentum=0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_tensors_are_written():
    with torch.inference_mode():
        out = tuple(torch.zeros(x.shape) for x in EXPECTED)
        teacher = torch.full((3,), 2.0)
        assert torch.equal(crop_into(MEAN, out=out), EXPECTED[0])
    assert torch.equal(crop_into(MEAN, out=out), EXPECTED[0])
    with torch.inference_mode():
        ema_update([teacher], [torch.ones(3)], 0.9)
        assert torch.equal(teacher, move_teacher(torch.ones(3)))


def test_compiled_code_writes_crops_in_one_graph():
    torch._dynamo.reset()
    compiled = torch.compile(lambda *images: crop_into(MEAN, images=list(images)), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*IMAGES), EXPECTED[0])
