"""The vision transformer of DINO (arXiv:2104.14294): pre-norm blocks, exact GELU, a class token.

State-dict names are the published ones, which timm and torch.hub share: `cls_token`, `pos_embed`,
`patch_embed.proj.*`, `blocks.N.{norm1,attn.qkv,attn.proj,norm2,mlp.fc1,mlp.fc2}.*`, `norm.*`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_fast.errors import UserError


class VisionTransformer(nn.Module):
    """Images `[B, in_chans, H, W]` -> normalised class tokens `[B, embed_dim]`.

    H and W are any multiples of `patch_size`: the position embeddings, learned for `img_size` (a side, or height and
    width), are interpolated. `drop_path_rate` is the stochastic depth of the last block, growing linearly from 0 at
    the first; see `set_drop_path_seed`. Raises UserError for sizes that do not fit together.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise UserError(f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}")
        if not 0 <= drop_path_rate < 1:
            raise UserError(f"drop_path_rate is {drop_path_rate}; it is a probability from 0 to below 1")
        self.embed_dim, self.patch_size, self.in_chans, self.num_heads = embed_dim, patch_size, in_chans, num_heads
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])
        self.grid = grid_of(*self.img_size, patch_size)
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid[0] * self.grid[1], embed_dim))
        rates = torch.linspace(0, drop_path_rate, depth).tolist()
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, qkv_bias, rate) for rate in rates)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        # The order of the draws is the published one: equal seeds give equal weights. The convolution of the patches
        # keeps torch's default.
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.apply(init_linear)

    def forward(self, x: Tensor) -> Tensor:
        x = self._blocks(x)
        return self.norm(x[:, 0])  # the norm works token by token: the other tokens' would be thrown away

    def forward_features(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` -> all normalised tokens `[B, 1 + N, embed_dim]`, the class token first."""
        return self.norm(self._blocks(x))

    def get_last_selfattention(self, x: Tensor) -> Tensor:
        """The last block's attention probabilities, `[B, heads, 1 + N, 1 + N]`."""
        x = self._tokens(x)
        for block in self.blocks[:-1]:
            x = block(x)
        last = self.blocks[-1]
        assert isinstance(last, Block)
        return last.attn.probabilities(last.norm1(x))

    def get_intermediate_layers(self, x: Tensor, n: int = 1) -> list[Tensor]:
        """The normalised tokens `[B, 1 + N, embed_dim]` after each of the last `n` blocks, in order."""
        if not 1 <= n <= len(self.blocks):
            raise UserError(f"n is {n}; this backbone has {len(self.blocks)} blocks, so 1 to {len(self.blocks)}")
        x = self._tokens(x)
        outputs = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i >= len(self.blocks) - n:
                outputs.append(self.norm(x))
        return outputs

    def position_embedding(self, height: int, width: int) -> Tensor:
        """The table `[1, 1 + h*w, embed_dim]` for a grid of h x w patches, bicubically interpolated.

        As in the original, the scale factor handed to the interpolation is (h + 0.1) / (table's height), which moves
        the sample points a little; released weights expect it. Bicubic interpolation is linear and separable, so it is
        two small matrix products with constant matrices: exact gradients to the table, and repeatable on a GPU.
        """
        if (height, width) == self.grid:
            return self.pos_embed
        rows, columns = self.grid
        dim = self.embed_dim
        with torch.autocast(self.pos_embed.device.type, enabled=False):
            table = self.pos_embed[0, 1:].reshape(rows, columns * dim)
            down = bicubic_matrix(rows, height).to(table)  # [h, rows]
            across = bicubic_matrix(columns, width).to(table)  # [w, columns]
            grid = across @ (down @ table).reshape(height, columns, dim)  # [h, w, dim]
            return torch.cat((self.pos_embed[:, :1], grid.reshape(1, height * width, dim)), dim=1)

    def _tokens(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise UserError(
                f"the backbone takes [B, {self.in_chans}, H, W], got {list(x.shape)}; "
                "build it with in_chans equal to the images' channels"
            )
        height, width = grid_of(x.shape[-2], x.shape[-1], self.patch_size)
        position = self.position_embedding(height, width)
        patches = self.patch_embed(x)  # [B, N, C]
        # The class token and its position are one row for all images: added before they are repeated.
        first = (self.cls_token + position[:, :1]).expand(len(patches), -1, -1)
        return torch.cat((first, patches + position[:, 1:]), dim=1)  # [B, 1 + N, C]

    def _blocks(self, x: Tensor) -> Tensor:
        x = self._tokens(x)
        for block in self.blocks:
            x = block(x)
        return x


class PatchEmbed(nn.Module):
    """`[B, C, H, W]` -> `[B, N, dim]`, patches row by row."""

    def __init__(self, patch_size: int, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self._heads(x)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, C))

    def probabilities(self, x: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(d)), `[B, H, N, N]`."""
        q, k, _ = self._heads(x)
        return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        B, N, C = x.shape
        # Taken apart where the projection wrote them: the gradients go back together in that order, without a copy.
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, C // self.num_heads).unbind(2)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # each [B, H, N, d], views


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, qkv_bias: bool, drop_path_rate: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop_path(x, self.attn(self.norm1(x)))
        return self.drop_path(x, self.mlp(self.norm2(x)))


class DropPath(nn.Module):
    """Stochastic depth: `x + branch`, the branch zeroed for whole samples with probability `rate`, else / (1 - rate).

    It draws from a generator of its own on the CPU, so that the draws depend on nothing else that draws and are the
    same on every device.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.seed = 0
        self.generator: torch.Generator | None = None

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x + branch
        if self.generator is None:
            self.generator = torch.Generator().manual_seed(self.seed)
        keep = 1 - self.rate
        mask = (torch.rand(len(x), generator=self.generator) < keep).to(x.dtype).div_(keep)  # [B]
        return x + branch * mask.to(x.device, non_blocking=True).view(-1, *[1] * (x.ndim - 1))

    def reseed(self, seed: int) -> None:
        self.seed, self.generator = seed, None

    def __getstate__(self) -> dict[str, Any]:
        # A generator cannot be pickled; a copy starts again from the seed.
        return {**self.__dict__, "generator": None}

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


def set_drop_path_seed(module: nn.Module, seed: int, step: int) -> None:
    """Makes every draw of stochastic depth in `module` until the next call a function of (seed, step, block)."""
    layers = [layer for layer in module.modules() if isinstance(layer, DropPath)]
    for block, layer in enumerate(layers):
        layer.reseed(mix(seed, step, block))


def mix(*numbers: int) -> int:
    """One 63-bit seed from several integers, any change of which changes half of its bits (splitmix64's finaliser)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


def grid_of(height: int, width: int, patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches. Raises UserError where they do not divide the image."""
    if patch_size < 1:
        raise UserError(f"patch_size is {patch_size}; it is a number of pixels, at least 1")
    if height < patch_size or width < patch_size or height % patch_size or width % patch_size:
        near = [max(1, round(side / patch_size)) * patch_size for side in (height, width)]
        raise UserError(
            f"an image of {height}x{width} pixels cannot be cut into patches of {patch_size}x{patch_size}; both sides "
            f"must be multiples of {patch_size}, for example {near[0]}x{near[1]}"
        )
    return height // patch_size, width // patch_size


@functools.cache
def bicubic_matrix(source: int, target: int) -> Tensor:
    """Float64 `[target, source]`: bicubic interpolation with the scale factor (target + 0.1) / source, as a matrix."""
    scale = (target + 0.1) / source
    with torch.no_grad(), torch.inference_mode(False):
        eye = torch.eye(source, dtype=torch.float64).view(1, source, source, 1)  # one channel a source row
        out = F.interpolate(eye, scale_factor=(scale, 1.0), mode="bicubic")  # [1, source, target, 1]
        return out.view(source, target).T.contiguous()


def init_linear(module: nn.Module) -> None:
    """Linear layers: normal of standard deviation 0.02 cut at ±2, zero bias."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
