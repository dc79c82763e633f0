"""The backbone of DINOv2 (arXiv:2304.07193) and of its version with registers (arXiv:2309.16588).

It is DINO's with a learned scale on each branch (LayerScale), for the giant a gated MLP (SwiGLU), register tokens
beside the class token, and a mask token, which only its training uses. State-dict names are the published ones: those
of `VisionTransformer` and `register_tokens`, `mask_token`, `blocks.N.{ls1,ls2}.gamma`, `blocks.N.mlp.{w12,w3}.*`.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_fast.models.packing import Packing
from dino_fast.models.vit import Block, Linear, VisionTransformer, init_linear, set_drop_path_seed

# Name in torch.hub -> embed_dim, depth, num_heads, and the giant's further arguments. `<name>_reg` has four registers.
SIZES: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "dinov2_vits14": (384, 12, 6, {}),
    "dinov2_vitb14": (768, 12, 12, {}),
    "dinov2_vitl14": (1024, 24, 16, {}),
    "dinov2_vitg14": (1536, 40, 24, {"swiglu": True}),
}
REGISTERS = 4
IMG_SIZE, PATCH_SIZE = 518, 14


class DINOv2(VisionTransformer):
    """Images `[B, in_chans, H, W]` -> normalized class tokens `[B, embed_dim]`.

    `layer_scale` is the learned scales' initial value, None leaves them out; `swiglu` takes the gated MLP, of hidden
    width 8 * ceil(mlp_ratio * embed_dim * 2/3 / 8). With registers the position embeddings are interpolated with
    antialiasing to the exact size, as the released weights with registers expect; `antialias` overrides that.

    `forward_features` and `get_intermediate_layers` give the class token and the patches, `[B, 1 + N, embed_dim]`, as
    every backbone here does; the registers are left out of them, and are in `get_last_selfattention` alone.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = IMG_SIZE,
        patch_size: int = PATCH_SIZE,
        in_chans: int = 3,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        *,
        registers: int = 0,
        layer_scale: float | None = 1e-5,
        swiglu: bool = False,
        mask_token: bool = True,
        antialias: bool | None = None,
    ) -> None:
        super().__init__(img_size, patch_size, in_chans, embed_dim, 0, num_heads, mlp_ratio, qkv_bias, drop_path_rate)
        nn.init.normal_(self.cls_token, std=1e-6)
        self.registers = registers
        self.antialias = registers > 0 if antialias is None else antialias
        if registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, registers, embed_dim))
            nn.init.normal_(self.register_tokens, std=1e-6)
        if mask_token:
            self.mask_token = nn.Parameter(torch.zeros(1, embed_dim), requires_grad=False)
        self.blocks = nn.ModuleList(
            ScaledBlock(embed_dim, num_heads, mlp_ratio, qkv_bias, rate, layer_scale, swiglu)
            for rate in torch.linspace(0, drop_path_rate, depth, dtype=torch.float64, device="cpu").tolist()
        )
        self.blocks.apply(init_linear)
        set_drop_path_seed(self, 0, 0)

    def get_intermediate_layers(self, x: Tensor, n: int = 1) -> list[Tensor]:
        """The normalized tokens `[B, 1 + N, embed_dim]` after each of the last `n` blocks, without the registers."""
        return [self._without_registers(tokens) for tokens in super().get_intermediate_layers(x, n)]

    def position_embedding(self, height: int, width: int) -> Tensor:
        """The table `[1, 1 + h*w, embed_dim]` for a grid of h x w patches; `antialias` says how it is interpolated."""
        if not self.antialias or (height, width) == self.grid:
            return super().position_embedding(height, width)
        return self.resampled(height, width, antialiased_matrix)

    def _leading(self, position: Tensor) -> Tensor:
        first = super()._leading(position)
        return torch.cat((first, self.register_tokens), dim=1) if self.registers else first

    def _without_registers(self, tokens: Tensor) -> Tensor:
        return torch.cat((tokens[:, :1], tokens[:, 1 + self.registers :]), dim=1) if self.registers else tokens


class ScaledBlock(Block):
    """A block whose branches are scaled channel by channel, and whose MLP may be gated."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        drop_path_rate: float,
        layer_scale: float | None,
        swiglu: bool,
    ) -> None:
        super().__init__(dim, num_heads, mlp_ratio, qkv_bias, drop_path_rate)
        if swiglu:
            self.mlp = SwiGLU(dim, -(-int(dim * mlp_ratio * 2 / 3) // 8) * 8)  # type: ignore[assignment]
        scaled = layer_scale is not None
        self.ls1 = LayerScale(dim, layer_scale) if scaled else nn.Identity()  # type: ignore[arg-type]
        self.ls2 = LayerScale(dim, layer_scale) if scaled else nn.Identity()  # type: ignore[arg-type]

    def attention_branch(self, x: Tensor, packing: Packing, cls_only: bool) -> Tensor:
        """The attention's contribution to the residual stream, scaled."""
        return cast(Tensor, self.ls1(super().attention_branch(x, packing, cls_only)))

    def mlp_branch(self, x: Tensor) -> Tensor:
        """The MLP's contribution to the residual stream, scaled."""
        return cast(Tensor, self.ls2(super().mlp_branch(x)))


class LayerScale(nn.Module):
    """A learned scale a channel (arXiv:2103.17239)."""

    def __init__(self, dim: int, start: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), start))

    def forward(self, x: Tensor) -> Tensor:
        """`[..., dim]` -> `[..., dim]`."""
        return x * self.gamma


class SwiGLU(nn.Module):
    """silu(a) * b, a and b the halves of one projection, projected back (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w12 = Linear(dim, 2 * hidden)
        self.w3 = Linear(hidden, dim)

    def forward(self, x: Tensor, norm: nn.LayerNorm | None = None) -> Tensor:
        """`[rows, dim]`, of which `norm` is taken first -> `[rows, dim]`."""
        gate, value = self.w12(x, norm).chunk(2, dim=-1)
        return cast(Tensor, self.w3(F.silu(gate) * value))


def model_options(name: str) -> dict[str, Any] | None:
    """The constructor's arguments of a model by its name in torch.hub, or None for a name that is none of them."""
    base = name.removesuffix("_reg")
    if base not in SIZES:
        return None
    embed_dim, depth, num_heads, more = SIZES[base]
    registers = REGISTERS if name.endswith("_reg") else 0
    return {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads, "registers": registers, **more}


@functools.cache
def antialiased_matrix(source: int, target: int) -> Tensor:
    """Float64 `[target, source]`: bicubic interpolation with antialiasing, as a matrix."""
    with torch.no_grad(), torch.inference_mode(False):
        # Columns are independent. (A channel for each row, of width 1, comes out wrong: torch mistakes the layout.)
        eye = torch.eye(source, dtype=torch.float64, device="cpu")[None, None]
        return F.interpolate(eye, size=(target, source), mode="bicubic", antialias=True)[0, 0]
