"""The student's optimizer and the teacher's moving average, in one pass over memory.

optimizer = AdamWEMA(student.parameters(), teacher.parameters(), clip_grad=3.0)
...
loss.backward()
optimizer.step(momentum=0.996)      # clips, updates the student, then the teacher

A training loop of someone else's calls `step()` alone: give AdamWEMA(..., momentum=0.996) then.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from dino_fast.dtensor import to_local
from dino_fast.ops.multi_tensor.param_batch import BatchCache, ParamBatch, grad_multipliers

CLIP_MODES = ("parameter", "global")

# What belongs to each parameter: the modules' own tensors. They may be given in groups, but are kept beside them, since
# whoever reads an optimizer (torch.distributed.checkpoint) expects all that is in a group to be in the state dict too.
_COMPANIONS = ("teacher_params", "bf16_params", "bf16_teacher")


# Options of torch.optim.Adam and AdamW that are another computation, with the only value offered.
_REFUSED = {"amsgrad": False, "maximize": False, "differentiable": False, "decoupled_weight_decay": True}


@torch.no_grad()
def ema_update(
    teacher: Iterable[Tensor], student: Iterable[Tensor], momentum: float | Tensor, *, skip: Tensor | None = None
) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, tensor by tensor, in place and in one call.

    Args:
        teacher, student: as many tensors of the same shapes in the same order, on one device, of any mix of float
            dtypes; the arithmetic is float32 (float64 where a tensor is). DTensors are averaged shard by shard.
        momentum: share of the old teacher that is kept, in [0, 1]: a number, or a tensor of one on the CPU. At 0.996 a
            bfloat16 teacher rounds to no change: keep it in float32. Either may change from call to call within
            `torch.compile`: it is an input of the compiled program.
        skip: a boolean scalar on the device: where it is true nothing changes. Nothing waits for it.

    Raises:
        ValueError: lists, shapes or devices that disagree, or a momentum outside [0, 1] or on another device.
        TypeError: a tensor that is not floating point.
    """
    old, new = [to_local(t) for t in teacher], [to_local(p) for p in student]
    if not (old or new):
        return
    if torch.compiler.is_compiling() and not isinstance(momentum, Tensor):
        momentum = torch.zeros((), dtype=torch.float64, device="cpu") + momentum  # not a constant of the program
    update = (
        torch.ops.dino_fast.ema_update_tensor_momentum
        if isinstance(momentum, Tensor)
        else torch.ops.dino_fast.ema_update
    )
    update(old, new, momentum, [], found_inf=as_found_inf(skip))


def as_found_inf(skip: Tensor | None, found_inf: Tensor | None = None) -> Tensor | None:
    """What the operations take: 0, positive after an overflow (the teacher moves on), infinite where all must stay."""
    if skip is None:
        return found_inf
    none = torch.zeros((), dtype=torch.float32, device=skip.device) if found_inf is None else found_inf.reshape(())
    return none.masked_fill(skip.to(none.device), torch.inf)


def only_makes_state(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the step that comes is one with which torch.distributed.checkpoint makes an optimizer's state."""
    return not any(optimizer.state.values()) and all(float(group["lr"]) == 0 for group in optimizer.param_groups)


def warn_that_teacher_stays(cure: str) -> None:
    warnings.warn(
        f"the optimizer has teacher_params, but this step has no momentum, so the teacher stays as it is. {cure} "
        f"Where something else moves the teacher, leave teacher_params out.",
        stacklevel=3,
    )


def _on(device: torch.device, found_inf: Tensor | None) -> Tensor | None:
    return None if found_inf is None else found_inf.to(device, non_blocking=True)


class AdamWEMA(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter, 2019) with gradient clipping and the teacher's EMA in the same pass over memory.

    The numbers are those of clipping, then `torch.optim.AdamW`, then `t <- m t + (1 - m) p`. A parameter without a
    gradient is left alone, but its teacher still follows it. Learning rate, weight decay and momentum may change at
    every step: set `group["lr"]`, `group["weight_decay"]` and `group["momentum"]`, or give `step` the momentum.

    Args:
        params: parameters, named or not, or groups (dicts with `params`, and any of `lr`, `betas`, `eps`,
            `weight_decay`, `momentum`, `teacher_params`, `bf16_params`, `bf16_teacher`).
        teacher_params: the teacher's counterparts in the same order: one flat list, or groups as `params`. None where
            the groups bring theirs, or where there is no teacher.
        clip_grad: largest 2-norm of a gradient; 0 does not clip.
        clip_mode: "parameter" clips each parameter's gradient by its own norm, as the original DINO does, "global" all
            of them by their common norm, as `torch.nn.utils.clip_grad_norm_`.
        momentum: share of the old teacher that a step without `momentum` keeps, in [0, 1]: the default of the groups,
            for training loops that call `step()` alone (accelerate, Hugging Face's Trainer). With None such a step
            leaves the teacher as it is, which is said once.
        bf16_params, bf16_teacher: bfloat16 tensors, one for each parameter, that hold rounded copies of student and
            teacher: written here, at every step, and by `refresh_copies`. A copy may be what the forward pass uses;
            its `.grad` then counts where the parameter itself has none.

    Dtypes: float32 (float64 runs on the reference). A bfloat16 parameter or teacher keeps a float32 master in the
    state (`master`, `teacher_master`), which is what is updated; the module holds its rounding. Masters are saved in
    the state dict, and made from the module where a loaded one has none; call `rebuild_masters` after changing
    such a module's weights by hand.

    Mixed precision: `torch.amp.GradScaler.step(optimizer, momentum=m)` works with or without `unscale_`. Without it
    the gradients are unscaled on the way (`.grad` itself keeps the scale) before they are clipped. After an overflow
    weights, moments and step counts stay, and the EMA still runs. Nothing waits for the device.

    The state dict is torch.optim.AdamW's, both ways, with the groups' `momentum` where they have one;
    `torch.distributed.checkpoint.state_dict` reads and writes it. amsgrad, maximize, differentiable and
    decoupled_weight_decay=False are refused. DTensors are updated shard by shard. Within `torch.compile` a step is one
    opaque call, which runs as it is; `fullgraph=True` has no place for it.

    Attributes:
        teacher_params, bf16_params, bf16_teacher: the tensors given, a list for each of `param_groups`, empty where
            the group has none. They are in no group and in no state dict.

    Raises:
        ValueError: options that are not offered or out of range, lists or shapes that disagree, or a momentum without
            a teacher.
        TypeError: parameters, teachers or copies of a dtype that is not accepted.
    """

    _step_supports_amp_scaling = True  # torch.amp.GradScaler then passes grad_scale and found_inf instead of waiting

    def __init__(
        self,
        params: Iterable[Any],
        teacher_params: Iterable[Any] | None,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.04,
        *,
        clip_grad: float = 0.0,
        clip_mode: str = "parameter",
        momentum: float | None = None,
        bf16_params: Iterable[Tensor] | None = None,
        bf16_teacher: Iterable[Tensor] | None = None,
    ) -> None:
        if clip_mode not in CLIP_MODES:
            raise ValueError(f"clip_mode must be one of {', '.join(CLIP_MODES)}; got {clip_mode!r}")
        if not clip_grad >= 0.0:
            raise ValueError(f"clip_grad must be 0 (no clipping) or the largest norm allowed; got {clip_grad}")
        self.clip_grad, self.clip_mode = clip_grad, clip_mode
        self._batch_cache: BatchCache | None = None
        self._norms: list[Tensor] = []
        self._warned = False
        self.teacher_params: list[list[Tensor]] = []
        self.bf16_params: list[list[Tensor]] = []
        self.bf16_teacher: list[list[Tensor]] = []
        groups = _as_groups(params)
        companions = (("teacher_params", teacher_params), ("bf16_params", bf16_params), ("bf16_teacher", bf16_teacher))
        for name, tensors in companions:
            if tensors is not None:
                _deal(groups, name, tensors)
        # AdamW's own keys, whatever this torch has, so that state dicts are interchangeable.
        adamw = torch.optim.AdamW(
            [torch.empty(0, dtype=torch.float32, device="cpu")], lr=lr, betas=betas, eps=eps, weight_decay=weight_decay
        )
        # In the groups, and so in the state dict, only where it is used: without it they are AdamW's to the key.
        super().__init__(groups, adamw.defaults | ({} if momentum is None else {"momentum": momentum}))
        if momentum is not None and not any(self.teacher_params):
            raise ValueError(f"momentum={momentum} moves a teacher, but there is none; give AdamWEMA teacher_params")
        self.refresh_copies()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in every optimizer; the group may bring `teacher_params`, `bf16_params` and `bf16_teacher`."""
        companions = {name: list(param_group.get(name) or ()) for name in _COMPANIONS}
        super().add_param_group({name: value for name, value in param_group.items() if name not in _COMPANIONS})
        group = self.param_groups[-1]
        try:
            for p in group["params"]:
                if p.dtype not in (torch.float32, torch.float64, torch.bfloat16):
                    raise TypeError(
                        f"parameters must be float32, bfloat16 or float64; got {p.dtype}. For float16, keep float32 "
                        f"parameters and use torch.autocast with torch.amp.GradScaler"
                    )
            _refuse_options(group, "a group has")
            _check_momentum(group.get("momentum"))
            for name, tensors in companions.items():
                _check_companions(name, tensors, group["params"])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        for name, tensors in companions.items():
            getattr(self, name).append(tensors)

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "clip_grad": self.clip_grad,
            "clip_mode": self.clip_mode,
            **{name: getattr(self, name) for name in _COMPANIONS},
            "_warned": self._warned,
            "_batch_cache": None,
            "_norms": [],
        }

    def __repr__(self) -> str:
        shown = ("lr", "betas", "eps", "weight_decay", "momentum")
        groups = [
            f"  {len(g['params'])} tensors: " + ", ".join(f"{k}={g[k]}" for k in shown if k in g)
            for g in self.param_groups
        ]
        return "\n".join([f"AdamWEMA(clip_grad={self.clip_grad}, clip_mode={self.clip_mode!r})", *groups])

    @torch._disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the parameters, and of their bfloat16 copies."""
        super().zero_grad(set_to_none)
        for copy in chain.from_iterable(self.bf16_params):
            copy.grad = None if set_to_none or copy.grad is None else copy.grad.zero_()

    # torch.optim wraps a class's step when it is first used, unless it is marked as wrapped. Here that is done before
    # it is made opaque: dynamo would otherwise compile the wrapper anew for every momentum.
    @torch._disable_dynamo
    @torch.optim.Optimizer.profile_hook_step
    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        momentum: float | None = None,
        skip: Tensor | None = None,
    ) -> Any:
        """Clip, update the parameters, then the teacher.

        Args:
            closure: re-evaluates the model and returns the loss, as in every optimizer.
            momentum: share of the old teacher that is kept, in [0, 1], in all groups; None takes each group's
                `momentum`. Without either the teacher stays as it is, with a warning the first time.
            skip: a boolean scalar on the device: where it is true, as for a loss that is not finite, the step changes
                nothing, the teacher neither. Nothing waits for it.

        Without `momentum`, a first step at learning rates of 0 is what torch.distributed.checkpoint makes the state
        with: it leaves the teacher as it is.

        Raises:
            ValueError: a momentum outside [0, 1], or one given where there is no teacher.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        makes_state = momentum is None and only_makes_state(self)
        momenta = self._momenta(momentum, makes_state)
        with_grad, without_grad = self._batches(momenta)
        found_inf, grad_scale = as_found_inf(skip, getattr(self, "found_inf", None)), getattr(self, "grad_scale", None)
        gradients = [batch.grads for batch in with_grad]
        multipliers, self._norms = grad_multipliers(gradients, grad_scale, self.clip_grad, self.clip_mode)
        keep = [1.0 if m is None else m for m in momenta]
        for batch, multiplier in zip(with_grad, multipliers, strict=True):
            batch.step(multiplier, _on(batch.device, found_inf), keep[batch.momentum_group])
            batch.grads = []  # the caller's to free, before the next forward
        for batch in without_grad:
            batch.update_teachers(keep[batch.momentum_group], _on(batch.device, found_inf))
        if makes_state:  # all of it: what is loaded next is read by these names
            for group, teachers in zip(self.param_groups, self.teacher_params, strict=True):
                for p, teacher in zip(group["params"], teachers, strict=False):
                    self._master(p, p, "master")
                    self._master(p, teacher, "teacher_master")
        return loss

    step.hooked = True  # type: ignore[attr-defined]

    def _momenta(self, momentum: float | None, makes_state: bool) -> list[float | None]:
        """The momentum of each group's teacher; None where it stays as it is, or there is none."""
        if len(self.teacher_params) != len(self.param_groups):
            raise ValueError(
                f"there are {len(self.param_groups)} param_groups and {len(self.teacher_params)} teacher_params; "
                f"change param_groups, teacher_params, bf16_params and bf16_teacher together"
            )
        if momentum is not None and not any(self.teacher_params):
            raise ValueError("step(momentum=...) moves a teacher, but there is none; give AdamWEMA teacher_params")
        momenta: list[float | None] = []
        for group, teachers in zip(self.param_groups, self.teacher_params, strict=True):
            value = group.get("momentum") if momentum is None else momentum
            _check_momentum(value)
            momenta.append(None if value is None or not teachers or makes_state else float(value))
            if value is None and teachers and not makes_state and not self._warned:
                self._warned = True
                warn_that_teacher_stays(
                    "Give AdamWEMA(..., momentum=0.996), set group['momentum'] in param_groups, or call "
                    "step(momentum=0.996)."
                )
        return momenta

    @property
    def grad_norm(self) -> Tensor | None:
        """The 2-norm of all gradients of the last step, before they were clipped, a scalar on the device; None where
        nothing is clipped, since no norms are made then."""
        if not self._norms:
            return None
        return torch.linalg.vector_norm(torch.cat([norms.to(self._norms[0].device) for norms in self._norms]))

    def write_hyperparameters(self, momentum: float | None = None) -> None:
        """Before each replay of a CUDA graph that holds `step(momentum=...)`: bring the groups' present learning rates
        and weight decays, and the momentum, to the device. Nothing else is computed.

        Run one step before the capture, and leave the gradients (or their set of Nones) as they were captured.
        """
        from dino_fast.ops.multi_tensor.cuda import writing_hyper_only

        with writing_hyper_only():
            self.step(momentum=momentum)

    @torch.no_grad()
    def refresh_copies(self) -> None:
        """Write the bfloat16 copies from the parameters and teachers, as `step` does. Call it after loading weights."""
        params = [group["params"] for group in self.param_groups]
        for sources, copies in ((params, self.bf16_params), (self.teacher_params, self.bf16_teacher)):
            for group_sources, group_copies in zip(sources, copies, strict=True):
                for source, copy in zip(group_sources, group_copies, strict=False):
                    copy.copy_(source)

    def rebuild_masters(self) -> None:
        """Forget the float32 masters of bfloat16 tensors; the next step makes them from the modules' weights."""
        self._batch_cache = None
        for state in self.state.values():
            state.pop("master", None)
            state.pop("teacher_master", None)

    def state_dict(self) -> dict[str, Any]:
        """torch.optim.AdamW's state dict, with float32 masters where a module is bfloat16, and with the groups'
        `momentum` where they have one; the teacher is not in it."""
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class or of torch.optim.AdamW (default, fused, foreach or capturable).

        Groups keep their `momentum` where the state dict has none. Teachers and copies stay; call `refresh_copies`
        after loading weights.

        Raises:
            ValueError: a state dict of other groups, or of options that are not offered.
        """
        for group in state_dict["param_groups"]:
            _refuse_options(group, "the state dict has a group with")
            _check_momentum(group.get("momentum"))
        momenta = [group.get("momentum") for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, momentum in zip(self.param_groups, momenta, strict=True):
            if momentum is not None and group.get("momentum") is None:
                group["momentum"] = momentum
        self._keep_float32(state_dict)
        self._batch_cache = None

    def _keep_float32(self, state_dict: dict[str, Any]) -> None:
        """Undo the base class's casts to the parameter's dtype; bring step counts to the parameter's device."""
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for index, p in zip(saved, params, strict=True):
            if index not in state_dict["state"]:
                continue
            state, source = self.state[p], state_dict["state"][index]
            step = torch.as_tensor(source["step"], dtype=torch.float32, device=p.device)
            state["step"] = step.clone() if step is source["step"] else step
            for name in ("exp_avg", "exp_avg_sq", "master", "teacher_master"):
                if p.dtype == torch.bfloat16 and name in source:
                    state[name] = source[name].to(p.device, torch.float32, copy=True)

    def _batches(self, momenta: list[float | None]) -> tuple[list[ParamBatch], list[ParamBatch]]:
        """What to step, in one batch for each device and setting of AdamW, and teachers of parameters at rest.

        Made anew only where tensors, settings or which of the parameters have gradients changed; otherwise this sets
        the gradients, learning rates and weight decays of the last ones. Which groups have equal momenta is such a
        setting, but not their values: a schedule changes them at every step.
        """
        groups = self.param_groups
        params = [p for group in groups for p in group["params"]]
        grads = [p.grad for p in params]
        if any(self.bf16_params):
            copies: list[Tensor | None] = []
            for group, shadows in zip(groups, self.bf16_params, strict=True):
                copies += shadows or [None] * len(group["params"])
            grads = [c.grad if g is None and c is not None else g for g, c in zip(grads, copies, strict=True)]
        shares = [None if m is None else momenta.index(m) for m in momenta]
        adamw = [(float(g["betas"][0]), float(g["betas"][1]), float(g["eps"])) for g in groups]
        settings = [*shares, *adamw, *(len(g["params"]) for g in groups), *(g is None for g in grads)]
        tensors = [*params, *(t for name in _COMPANIONS for tensors in getattr(self, name) for t in tensors)]
        cache = self._batch_cache
        if not (
            cache and cache.settings == settings and _identical(cache.tensors, tensors) and cache.state_is_current()
        ):
            cache = self._batch_cache = BatchCache(settings, tensors, *self._assemble(adamw, shares, grads))
        rates = [(float(group["lr"]), float(group["weight_decay"])) for group in groups]
        for batch in cache.with_grad:
            batch.grads = [grads[i] for i in batch.index]
            batch.lrs = [rates[g][0] for g in batch.group]
            batch.weight_decays = [rates[g][1] for g in batch.group]
        return cache.with_grad, cache.without_grad

    def _assemble(
        self, adamw: list[tuple[float, float, float]], shares: list[int | None], grads: list[Tensor | None]
    ) -> tuple[list[ParamBatch], list[ParamBatch]]:
        with_grad: dict[Any, ParamBatch] = {}
        without_grad: dict[Any, ParamBatch] = {}
        index = -1
        companions = zip(self.teacher_params, self.bf16_params, self.bf16_teacher, strict=True)
        for group_index, (teachers, shadows, teacher_shadows) in enumerate(companions):
            group, share = self.param_groups[group_index], shares[group_index]
            for i, p in enumerate(group["params"]):
                index += 1
                has_grad = grads[index] is not None
                teacher = None if share is None else teachers[i]
                if not has_grad and teacher is None:
                    continue
                key = (p.device, adamw[group_index], share)
                batch = (with_grad if has_grad else without_grad).setdefault(
                    key, ParamBatch(p.device, *adamw[group_index], group_index)
                )
                if has_grad:
                    batch.add_state(index, group_index, self._init_state(p))
                shadow = shadows[i] if shadows else None
                batch.add(self._master(p, p, "master"), p if p.dtype == torch.bfloat16 else shadow)
                if teacher is not None:
                    shadow = teacher_shadows[i] if teacher_shadows else None
                    master = self._master(p, teacher, "teacher_master")
                    batch.add_teacher(master, teacher if teacher.dtype == torch.bfloat16 else shadow)
        return list(with_grad.values()), list(without_grad.values())

    def _init_state(self, p: Tensor) -> dict[str, Any]:
        """The parameter's state, made at its first use. Moments of a bfloat16 parameter are float32."""
        state = self.state[p]
        if "step" not in state:
            wide = torch.float32 if p.dtype == torch.bfloat16 else p.dtype
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"] = torch.zeros_like(p, dtype=wide, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=wide, memory_format=torch.preserve_format)
        return state

    def _master(self, p: Tensor, module_tensor: Tensor, name: str) -> Tensor:
        """The tensor that is updated: the module's own, or the float32 master of a bfloat16 one."""
        if module_tensor.dtype != torch.bfloat16:
            return module_tensor
        state = self._init_state(p)
        if name not in state:
            state[name] = module_tensor.detach().float()
        return state[name]


# ---- arguments ----


def _identical(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(map(operator.is_, some, others))


def _as_groups(params: Iterable[Any]) -> list[dict[str, Any]]:
    entries = list(params)
    if not entries:
        raise ValueError("AdamWEMA got no parameters")
    groups = [dict(e) for e in entries] if isinstance(entries[0], dict) else [{"params": entries}]
    for group in groups:
        group["params"] = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
    return groups


def _deal(groups: list[dict[str, Any]], name: str, tensors: Iterable[Any]) -> None:
    """Give each group its share of a flat list, or of a list of groups."""
    flat: list[Any] = []
    for entry in tensors:
        flat.extend(entry["params"] if isinstance(entry, dict) else [entry])
    flat = [entry[1] if isinstance(entry, tuple) else entry for entry in flat]  # named_parameters()
    wanted = sum(len(group["params"]) for group in groups)
    if len(flat) != wanted:
        raise ValueError(f"{name} has {len(flat)} tensors for {wanted} parameters; give one for each, in their order")
    for group in groups:
        if name in group:
            raise ValueError(f"{name} was given as an argument and in a group; give it once")
        group[name], flat = flat[: len(group["params"])], flat[len(group["params"]) :]


def _check_companions(name: str, tensors: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    if not tensors:
        return
    if len(tensors) != len(params):
        raise ValueError(f"{name} has {len(tensors)} tensors for {len(params)} parameters; give one for each")
    for i, (t, p) in enumerate(zip(tensors, params, strict=True)):
        if t.shape != p.shape or t.device != p.device:
            raise ValueError(
                f"{name}[{i}] is {tuple(t.shape)} on {t.device}, but its parameter {tuple(p.shape)} on {p.device}; "
                f"is the list in the parameters' order?"
            )
        if name != "teacher_params" and (t.dtype != torch.bfloat16 or p.dtype == torch.bfloat16):
            raise TypeError(
                f"{name}[{i}] is {t.dtype} and its parameter {p.dtype}; the copies are bfloat16 ones of float32 "
                f"parameters (a bfloat16 parameter has its float32 master in the optimizer, and needs no copy)"
            )
        accepted = (torch.float64,) if p.dtype == torch.float64 else (torch.float32, torch.bfloat16)
        if name == "teacher_params" and t.dtype not in accepted:
            raise TypeError(
                f"teacher_params[{i}] is {t.dtype} and its parameter {p.dtype}; "
                f"the teacher must be {' or '.join(map(str, accepted))}"
            )


def _refuse_options(group: dict[str, Any], where: str) -> None:
    for option, offered in _REFUSED.items():
        if bool(group.get(option, offered)) != offered:
            raise ValueError(f"{where} {option}={group[option]}, which AdamWEMA does not offer; leave it out")


def _check_momentum(momentum: float | None) -> None:
    if momentum is not None and not 0.0 <= momentum <= 1.0:
        raise ValueError(f"momentum must lie in [0, 1]: the share of the old teacher that is kept; got {momentum}")
