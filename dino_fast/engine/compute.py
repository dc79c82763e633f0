"""How the networks compute: number formats, compiled blocks, and what is kept for the backward pass."""

from __future__ import annotations

import copy
import functools
from typing import Any, cast

import torch
import torch.utils.checkpoint
from torch import nn

from dino_fast.engine.config import Config
from dino_fast.errors import UserError
from dino_fast.models import MultiCropWrapper, VisionTransformer

# Blocks differ in how many crops they keep, so one function is compiled for several sizes; the default is 8.
VARIANTS = 64
# What selective checkpointing keeps: the results of matrix products and of attention. The rest is cheap to make again.
KEPT = ("mm", "addmm", "bmm", "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention")
KEPT_OF_CPUS = ("_scaled_dot_product_flash_attention_for_cpu",)


def use_tf32(wanted: bool) -> None:
    """Whether float32 products on a GPU round their inputs to TF32, for the whole process."""
    # Not by `fp32_precision`: set one by one those leave what torch.export asks for ambiguous, which it refuses.
    torch.backends.cuda.matmul.allow_tf32 = wanted
    torch.backends.cudnn.allow_tf32 = wanted


def keeps_half_copies(config: Config, precision: str, network: nn.Module, world: int) -> bool:
    """Whether the networks compute with bfloat16 copies of their weights, written by the optimizer; else bf16 is
    autocast's. Batch norm needs its own formats, and gradients are exchanged under the names of the float32 weights."""
    has_norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())
    return precision == "bf16" and config.optimizer == "adamw" and world == 1 and not has_norm


def half_copy(network: MultiCropWrapper) -> MultiCropWrapper:
    """The same network with bfloat16 weights of its own."""
    return copy.deepcopy(network).to(torch.bfloat16)


def checkpoint_blocks(backbone: nn.Module, mode: str) -> None:
    """What a block keeps for the backward pass: everything ("none"), the results of its products and its attention
    ("selective"), or its input alone ("full"); the rest is computed again, to the same bits."""
    if mode == "none":
        return
    if not isinstance(backbone, VisionTransformer):
        raise UserError(f"--checkpoint-activations {mode} is for vit_* architectures; use none")
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if mode == "selective":
        kept = [getattr(torch.ops.aten, name).default for name in (*KEPT, *KEPT_OF_CPUS)]
        kept.append(torch.ops.dino_fast.packed_attention_forward.default)
        make = torch.utils.checkpoint.create_selective_checkpoint_contexts
        options["context_fn"] = functools.partial(make, kept)
    backbone.call_block = functools.partial(torch.utils.checkpoint.checkpoint, **options)


def compile_blocks(network: MultiCropWrapper) -> None:
    """Compiles each block, which are all alike, and the head's layers before the prototypes."""
    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
    if isinstance(network.backbone, VisionTransformer):
        for block in network.backbone.blocks:
            block.compile()
    else:
        network.backbone.compile()
    cast(nn.Module, network.head.mlp).compile()
