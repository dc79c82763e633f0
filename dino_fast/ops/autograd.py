"""Shared autograd code of the operations: registers operators, and refuses derivatives that do not exist.

An operation has two doors. Plain tensors go straight to an `autograd.Function` (`is_plain`): with cold caches the
dispatcher costs 0.2 to 0.7 ms, a tenth of a large problem. Everything else, compiled and recorded code above all, goes
through the operator `torch.ops.dino_fast.NAME` (`define_operator`).

Each operation has one derivative, in reverse mode. Another one is refused by name and never taken for zero:

- a gradient that is differentiated again: `once_differentiable`
- forward mode (dual tensors, `torch.func.jvp`, `jacfwd`), and `torch.func.grad`, `vjp` and `jacrev`: the operators

`torch.func.vmap` works, one sample after the other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._library.autograd import Info, make_autograd_impl
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

_LIBRARY = torch.library.Library("dino_fast", "FRAGMENT")
Backward = Callable[..., Any]
PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter))  # no subclass with a dispatch of its own


def is_plain(*tensors: Tensor) -> bool:
    """Whether only autograd has to see the operations on these tensors.

    That is: no tensor subclass, no compiler or other tracer, no mode, no transform of `torch.func`, no forward-mode
    differentiation.
    """
    return (
        not torch.compiler.is_compiling()
        and PLAIN_TYPES.issuperset(map(type, tensors))
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and forward_ad._current_level < 0
        and not torch._C._are_functorch_transforms_active()
        and not torch.jit.is_tracing()
    )


def define_operator(
    name: str,
    forward: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    alternative: str,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    mutates_args: Sequence[str] = (),
    flops: Callable[..., int] | None = None,
) -> None:
    """Registers `torch.ops.dino_fast.NAME` with the schema of `forward`'s annotations.

    Args:
        fake: gives outputs of the right shapes and dtypes, as `torch.library.register_fake` takes it.
        alternative: name of a function to differentiate where this operator cannot be, for the message.
        backward, setup_context: as `torch.library.register_autograd` takes them; without them, no derivative.
        flops: floating-point operations of a call with these arguments, for `torch.utils.flop_counter.FlopCounterMode`.
        mutates_args: the parameters whose tensors are written in place. Such an operator has no derivative, and is
            refused where one is recorded.

    Not `torch.library.custom_op`, whose operators drop the tangents of dual tensors without a word.
    """
    _LIBRARY.define(
        name + torch.library.infer_schema(forward, mutates_args=mutates_args), tags=(torch.Tag.pt2_compliant_tag,)
    )
    _LIBRARY.impl(name, forward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dino_fast::{name}", fake, lib=_LIBRARY)
    operator = getattr(torch.ops.dino_fast, name).default
    if flops is not None:
        register_flop_formula(getattr(torch.ops.dino_fast, name), get_raw=True)(
            lambda *arguments, out_val=None, **named: flops(*arguments, **named)
        )
    differentiate = make_autograd_impl(operator, Info(backward, setup_context))

    def autograd(keyset: Any, *arguments: Any) -> Any:
        refuse_transforms(f"dino_fast::{name}", alternative, *arguments)
        if mutates_args and torch.is_grad_enabled() and any(x.requires_grad for x in _tensors_in(arguments)):
            raise RuntimeError(
                f"dino_fast::{name} writes in place and has no derivative; call it under torch.no_grad()"
            )
        return differentiate(keyset, *arguments)

    _LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)
    if not mutates_args:
        return
    written = [i for i, x in enumerate(operator._schema.arguments) if x.name in mutates_args]

    def count_versions(keyset: Any, *arguments: Any) -> Any:
        increment_versions(_tensors_in(arguments[i] for i in written))
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return operator.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *arguments)

    _LIBRARY.impl(name, count_versions, "ADInplaceOrView", with_keyset=True)


def increment_versions(tensors: Iterable[Tensor]) -> None:
    """Tells autograd that native code writes these tensors, so that a backward that needs their old values refuses."""
    torch.autograd.graph.increment_version([x for x in tensors if not x.is_inference()])


def _tensors_in(arguments: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among an operator's arguments, of which some are lists."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, (list, tuple)):
            yield from _tensors_in(argument)


def refuse_transforms(operation: str, alternative: str, *arguments: Any) -> None:
    """Raises NotImplementedError where an argument is to be differentiated in forward mode or by `torch.func`."""
    if forward_ad._current_level >= 0:
        floats = (x for x in _tensors_in(arguments) if x.is_floating_point())
        if any(forward_ad.unpack_dual(x).tangent is not None for x in floats):
            raise NotImplementedError(
                f"{operation} has no forward-mode derivative (dual tensors, torch.func.jvp, jacfwd); "
                f"take loss.backward() or torch.autograd.grad, or differentiate {alternative}"
            )
    in_transform = torch._C._are_functorch_transforms_active() and torch.is_grad_enabled()
    if in_transform and any(x.requires_grad for x in _tensors_in(arguments)):
        raise NotImplementedError(
            f"{operation} cannot be differentiated by torch.func (grad, vjp, jacrev); "
            f"take loss.backward() or torch.autograd.grad, or differentiate {alternative}"
        )


def once_differentiable(operation: str, alternative: str) -> Callable[[Backward], Backward]:
    """Decorates a backward whose gradients must not be differentiated again: that raises RuntimeError.

    PyTorch's decorator of this name lets `torch.autograd.grad` take them for constants, since its error is raised by a
    node without inputs. The gradients depend on the upstream ones, on the saved tensors, and on `ctx.anchors` for
    inputs that are not saved.
    """

    def decorate(backward: Backward) -> Backward:
        @functools.wraps(backward)
        def decorated(ctx: Any, *upstream: Tensor | None) -> Any:
            if not torch.is_grad_enabled():
                return backward(ctx, *upstream)
            with torch.no_grad():
                gradients = backward(ctx, *upstream)
            return _NoDoubleBackward.guard(operation, alternative, gradients, (*upstream, *_backward_inputs(ctx)))

        return decorated

    return decorate


def _backward_inputs(ctx: Any) -> tuple[Tensor | None, ...]:
    return *ctx.saved_tensors, *getattr(ctx, "anchors", ())


def anchor(tensor: Tensor) -> Tensor:
    """An empty tensor that autograd sees as computed from this one; it keeps none of its memory."""
    with torch.enable_grad():
        return tensor.narrow(0, 0, 0).clone()


def savable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where autograd would refuse to keep it for the backward: one made in inference mode."""
    return tensor.clone() if tensor.is_inference() and not torch.is_inference_mode_enabled() else tensor


class _NoDoubleBackward(torch.autograd.Function):
    """Passes gradients on as functions of the tensors they were computed from, and refuses to differentiate them."""

    @classmethod
    def guard(
        cls, operation: str, alternative: str, gradients: Tensor | tuple[Tensor | None, ...], sources: tuple[Any, ...]
    ) -> Any:
        several = gradients if isinstance(gradients, tuple) else (gradients,)
        sources = tuple(x for x in sources if isinstance(x, Tensor) and x.requires_grad)
        present = [x for x in several if x is not None]
        if not sources or not present:
            return gradients
        guarded = iter(cls.apply(operation, alternative, len(present), *present, *sources))
        result = tuple(None if x is None else next(guarded) for x in several)
        return result if isinstance(gradients, tuple) else result[0]

    @staticmethod
    def forward(ctx: Any, operation: str, alternative: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.names = operation, alternative
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        operation, alternative = ctx.names
        raise RuntimeError(f"{operation} has no second derivative; differentiate {alternative} instead")


def split_temps(student_temp: float | Tensor, teacher_temp: float | Tensor) -> tuple[float, float, Tensor | None]:
    """The temperatures as an operator takes them.

    Both numbers and None; or, where one is a tensor, 1, 1 and both in a float64 tensor [2] on the host. A number is a
    constant in traced code, which is compiled anew for each; a tensor is an input.
    """
    if not isinstance(student_temp, Tensor) and not isinstance(teacher_temp, Tensor):
        return student_temp, teacher_temp, None
    both = [torch.as_tensor(x, dtype=torch.float64, device="cpu") for x in (student_temp, teacher_temp)]
    return 1.0, 1.0, torch.stack(both)


def read_temps(student_temp: float, teacher_temp: float, changing: Tensor | None) -> tuple[float, float]:
    """The temperatures that `split_temps` was given."""
    if changing is None:
        return student_temp, teacher_temp
    student_temp, teacher_temp = changing.tolist()
    return student_temp, teacher_temp
