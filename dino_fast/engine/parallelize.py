"""How the networks compute and how they are distributed: number formats, compiled and checkpointed blocks, DDP, FSDP.

Gradients are averaged over the processes in one of three ways (`--fsdp`):

    none    DistributedDataParallel: every process holds everything, gradients are all-reduced in the backward pass
    grads   FSDP2: weights, gradients and moments are sharded by rows; gathered weights stay until the backward pass
    full    FSDP2: weights are gathered block by block, and again for the backward pass

Under the last two the teacher is sharded just as the student is, so its moving average needs no communication, and the
prototypes stay sharded by rows: `dino_fast.ops.linear_dino_loss.sharded` reduces the loss over the ranks.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from dino_fast.engine.config import Config
from dino_fast.errors import UserError
from dino_fast.models import DINOHead, MultiCropWrapper, VisionTransformer

# Blocks differ in how many crops stochastic depth keeps, so one function is compiled for several sizes; default: 8.
VARIANTS = 64
# Operations whose results selective checkpointing saves: matrix products and attention. The rest is cheap to recompute.
SAVED_OPS = (
    *("mm", "addmm", "bmm", "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention"),
    "_scaled_dot_product_flash_attention_for_cpu",
)

# ---- number formats, compilation, activation checkpointing ----


def use_tf32(wanted: bool) -> None:
    """Sets for the whole process whether float32 products on a GPU round their inputs to TF32."""
    # Not through `fp32_precision`: mixing both settings leaves a state that torch.export refuses as ambiguous.
    torch.backends.cuda.matmul.allow_tf32 = wanted
    torch.backends.cudnn.allow_tf32 = wanted


def uses_bf16_models(config: Config, precision: str, network: nn.Module, world: int) -> bool:
    """Whether forward passes use bfloat16 copies of the weights, which the optimizer writes; else bf16 means autocast.

    Batch norm needs float32 statistics, and with several processes DDP and FSDP exchange gradients of the float32
    parameters.
    """
    has_norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())
    return precision == "bf16" and config.optimizer == "adamw" and world == 1 and not has_norm


def bf16_copy(network: MultiCropWrapper) -> MultiCropWrapper:
    """A copy of the network with bfloat16 weights."""
    return copy.deepcopy(network).to(torch.bfloat16)


def checkpoint_blocks(backbone: nn.Module, mode: str) -> None:
    """Sets which activations each block saves for the backward pass.

    All ("none"), the results of its matrix products and attention ("selective"), or its input alone ("full"). The rest
    is recomputed, to the same bits. Raises UserError where the backbone is no VisionTransformer.
    """
    if mode == "none":
        return
    if not isinstance(backbone, VisionTransformer):
        raise UserError(f"--checkpoint-activations {mode} is for vit_* architectures; use none")
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if mode == "selective":
        saved = [getattr(torch.ops.aten, name).default for name in SAVED_OPS]
        saved.append(torch.ops.dino_fast.packed_attention_forward.default)
        make = torch.utils.checkpoint.create_selective_checkpoint_contexts
        options["context_fn"] = functools.partial(make, saved)
    backbone.call_block = functools.partial(torch.utils.checkpoint.checkpoint, **options)


def compile_blocks(network: MultiCropWrapper) -> None:
    """Compiles each block (all have one code) and the head's MLP."""
    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
    if isinstance(network.backbone, VisionTransformer):
        for block in network.backbone.blocks:
            block.compile()
    else:
        network.backbone.compile()
    cast(nn.Module, network.head.mlp).compile()


# ---- several processes ----


def parallelize(
    config: Config,
    student: MultiCropWrapper,
    teacher: MultiCropWrapper,
    device: torch.device,
    dtype: torch.dtype | None,
) -> None:
    """Shards both networks as `config.fsdp` says and converts batch norm to SyncBatchNorm.

    DDP wraps the student later (`replicate`), when the first step knows which parameters are frozen. `dtype` is the
    format that FSDP gathers weights in. Raises UserError for batch norm on CPUs, or FSDP with SGD or LARS.
    """
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in student.modules()):
        if device.type != "cuda":
            raise UserError("batch norm over several processes needs GPUs (PyTorch's SyncBatchNorm); use one process")
        for network in (student, teacher):
            network.backbone, network.head = map(
                nn.SyncBatchNorm.convert_sync_batchnorm, (network.backbone, network.head)
            )
    if config.fsdp == "none":
        return
    if config.optimizer != "adamw":
        raise UserError(f"--optimizer {config.optimizer} needs unsharded weights; use --fsdp none with it, or adamw")
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    shard(student, mesh, reshard=config.fsdp == "full", dtype=dtype)
    # Gathered anew for every forward pass: FSDP does not know that the moving average has changed the shards.
    shard(teacher, mesh, reshard=True, dtype=dtype)


class DDPAdapter(nn.Module):
    """Module whose forward pass calls any function of the student, so that DistributedDataParallel can wrap it."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The function's result."""
        return function(*arguments)


def replicate(student: nn.Module) -> nn.Module:
    """Wraps the student in DistributedDataParallel; call it with a function of the student and that one's arguments.

    It covers the parameters that require a gradient now: wrap again when that changes.
    """
    from torch.nn.parallel import DistributedDataParallel

    # Weights are equal already: functions of the seed, or read from one checkpoint.
    return DistributedDataParallel(DDPAdapter(student), gradient_as_bucket_view=True, init_sync=False)


def shard(network: MultiCropWrapper, mesh: Any, *, reshard: bool, dtype: torch.dtype | None) -> None:
    """Applies FSDP2 to each block, the rest of the backbone and the head, and shards the prototypes by rows.

    With `reshard` gathered weights are freed after the forward pass; `dtype` is the format they are gathered in.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for part in (*getattr(network.backbone, "blocks", ()), network.backbone, *_head_modules(network)):
        fully_shard(part, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy)
    shard_rows(cast(nn.Module, network.head.last_layer), mesh)


def _head_modules(network: MultiCropWrapper) -> list[nn.Module]:
    """The head's modules before the prototypes: the MLP, and the predictor if there is one."""
    head = cast(DINOHead, network.head)
    return [head.mlp] if head.predictor is None else [head.mlp, head.predictor]


def shard_rows(layer: nn.Module, mesh: Any) -> None:
    """Turns the layer's parameters into DTensors sharded by rows."""
    from torch.distributed.tensor import Shard, distribute_tensor

    for name, parameter in list(layer.named_parameters()):
        rows = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None)
        setattr(layer, name, nn.Parameter(rows, requires_grad=parameter.requires_grad))


def sync_gradients(student: MultiCropWrapper, forward_fn: Any, now: bool) -> contextlib.AbstractContextManager[Any]:
    """Context of a forward pass whose backward pass averages gradients over the processes where `now` is true.

    Else gradients accumulate in this process alone.
    """
    for part in (student.backbone, *_head_modules(student)):
        if hasattr(part, "set_requires_gradient_sync"):
            cast(Any, part).set_requires_gradient_sync(now)
    if not now and hasattr(forward_fn, "no_sync"):
        return cast("contextlib.AbstractContextManager[Any]", forward_fn.no_sync())
    return contextlib.nullcontext()


# ---- sharded and whole tensors ----


def shard_like(whole: Tensor, like: Tensor) -> Tensor:
    """`whole` [rows, ...] sharded as `like` is."""
    if not hasattr(like, "device_mesh"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]


def full_state_dict(value: Any, keep: bool) -> Any:
    """Copies the nested `value` to the CPU, with DTensors gathered; None if not `keep`. All processes call it."""
    if isinstance(value, dict):
        items = {key: full_state_dict(item, keep) for key, item in value.items()}
        return items if keep else None
    if isinstance(value, list | tuple):
        entries = [full_state_dict(item, keep) for item in value]
        return type(value)(entries) if keep else None
    if isinstance(value, Tensor):
        whole = cast(Any, value).full_tensor() if hasattr(value, "full_tensor") else value
        return whole.detach().to("cpu", copy=True) if keep else None
    return value if keep else None
