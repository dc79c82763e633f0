"""The vision transformer of DINO (arXiv:2104.14294): pre-norm blocks, exact GELU, a class token.

State-dict names are the published ones, which timm and torch.hub share: `cls_token`, `pos_embed`,
`patch_embed.proj.*`, `blocks.N.{norm1,attn.qkv,attn.proj,norm2,mlp.fc1,mlp.fc2}.*`, `norm.*`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_fast.errors import UserError
from dino_fast.models.packing import (
    GATHER_FROM,
    KeptSamples,
    Packing,
    add_to_kept,
    attend,
    attend_first,
    computed_count,
    joined,
    pack,
    take,
    without_dropped,
)
from dino_fast.ops.linear.matmul import Norm, linear
from dino_fast.ops.linear.mlp import mlp
from dino_fast.seeding import derive_seed


class VisionTransformer(nn.Module):
    """Images `[B, in_chans, H, W]` -> normalized class tokens `[B, embed_dim]`.

    H and W are any multiples of `patch_size`: the position embeddings, learned for `img_size` (a side, or height and
    width), are interpolated. `drop_path_rate` is the stochastic depth of the last block, growing linearly from 0 at
    the first; see `set_drop_path_seed`. Raises UserError for sizes that do not fit together.
    """

    registers = 0  # tokens between the class token and the patches

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        *,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        if num_classes:
            raise UserError(f"num_classes is {num_classes}; backbones have no classifier here: put an nn.Linear on top")
        if embed_dim % num_heads:
            raise UserError(f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}")
        if not 0 <= drop_path_rate < 1:
            raise UserError(f"drop_path_rate is {drop_path_rate}; it is a probability from 0 to below 1")
        self.embed_dim, self.patch_size, self.in_chans, self.num_heads = embed_dim, patch_size, in_chans, num_heads
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[-1])
        self.grid = grid_of(*self.img_size, patch_size)
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid[0] * self.grid[1], embed_dim))
        rates = torch.linspace(0, drop_path_rate, depth, dtype=torch.float64, device="cpu").tolist()
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, qkv_bias, rate) for rate in rates)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.call_block: Callable[..., Tensor] = _call  # or through `torch.utils.checkpoint`
        # The order of the draws is the published one. Equal seeds give the original's weights only where it, too, uses
        # torch's trunc_normal_ (its own copy samples in another way). The convolution of the patches keeps torch's
        # default.
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.apply(init_linear)
        set_drop_path_seed(self, 0, 0)  # blocks differ, also where nobody sets it

    def forward(self, x: Tensor | Sequence[Tensor], keep_indices: Tensor | None = None) -> Tensor:
        """Images `[B, C, H, W]`, or several such tensors of different sizes -> `[sum of B, embed_dim]`.

        All sizes go through as one buffer of tokens. `keep_indices` come from `stochastic_depth`, which is called here
        where they are not given.
        """
        images = [x] if isinstance(x, Tensor) else list(x)
        tokens, packing = self._tokens(images)
        branches = self._kept_samples(packing, images, keep_indices)
        for block, pair in zip(self.blocks[:-1], branches, strict=False):
            tokens = self.call_block(block, tokens, packing, pair)
        # Nothing but the class token is used after the last block, so the rest of it is made for that token alone.
        return cast(Tensor, self.norm(self.call_block(self.blocks[-1], tokens, packing, branches[-1], True)))

    def forward_features(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` -> all normalized tokens `[B, 1 + N, embed_dim]`, the class token first."""
        return self.get_intermediate_layers(x)[0]

    def get_last_selfattention(self, x: Tensor) -> Tensor:
        """The last block's attention probabilities, `[B, heads, 1 + N, 1 + N]`."""
        tokens, packing = self._tokens([x])
        for block in self.blocks[:-1]:
            tokens = block(tokens, packing)
        last = self.blocks[-1]
        assert isinstance(last, Block)
        return last.attn.probabilities(last.norm1(tokens).unflatten(0, packing.groups[0]))

    def get_intermediate_layers(self, x: Tensor, n: int = 1) -> list[Tensor]:
        """The normalized tokens `[B, 1 + N, embed_dim]` after each of the last `n` blocks, in order."""
        if not 1 <= n <= len(self.blocks):
            raise UserError(f"n is {n}; this backbone has {len(self.blocks)} blocks, so 1 to {len(self.blocks)}")
        tokens, packing = self._tokens([x])
        outputs = []
        branches = self._kept_samples(packing, [x], None)
        for i, (block, kept_samples) in enumerate(zip(self.blocks, branches, strict=True)):
            tokens = block(tokens, packing, kept_samples)
            if i >= len(self.blocks) - n:
                outputs.append(self.norm(tokens).unflatten(0, packing.groups[0]))
        return outputs

    def stochastic_depth(self, images: Sequence[Tensor], numbers: np.ndarray[Any, Any] | None = None) -> Tensor | None:
        """Draws the images that stochastic depth keeps: int64 on the CPU, for `forward`; None where it drops none.

        `numbers` int64 `[sum of B]` are the images' in the whole batch, size by size (default 0, 1, ...). In blocks
        of a rate below `packing.GATHER_FROM` an image's draw is a function of its number and the seed, whichever images
        are beside it; from there on, of the others' numbers too. How long the result is depends on how many images
        there are, alone.
        """
        layers = [block.drop_path for block in cast("list[Block]", self.blocks) if block.drop_path.rate > 0]
        if not self.training or not layers:
            return None
        counts = [len(x) for x in images]
        array = np.arange(sum(counts)) if numbers is None else np.asarray(numbers)
        if len(array) != sum(counts):
            raise UserError(f"{len(array)} numbers for {sum(counts)} images; each image has one")
        return torch.cat([layer.draw(counts, array) for layer in layers for _ in range(2)])

    def _kept_samples(
        self, packing: Packing, images: Sequence[Tensor], keep_indices: Tensor | None
    ) -> list[tuple[KeptSamples, KeptSamples] | None]:
        """For each block the images that its two branches are computed for and added to, None for all."""
        device = images[0].device
        if keep_indices is None:
            keep_indices = self.stochastic_depth(images)
            if keep_indices is not None and device.type == "cuda":
                keep_indices = keep_indices.pin_memory().to(device, non_blocking=True)
        if keep_indices is None:
            return [None] * len(self.blocks)
        shapes_may_change = type(keep_indices) is Tensor and device.type == "cpu" and not torch.compiler.is_compiling()
        result: list[tuple[KeptSamples, KeptSamples] | None] = []
        used = 0
        for block in cast("list[Block]", self.blocks):
            rate = block.drop_path.rate
            if rate == 0:
                result.append(None)
                continue
            counts = [computed_count(n, rate) for n, _ in packing.groups]
            gathers = rate >= GATHER_FROM
            lengths = [length for _, length in packing.groups]
            inner = pack(list(zip(counts, lengths, strict=True)), device) if gathers else packing
            pair = []
            for _ in range(2):
                sizes = [*(counts if gathers else ()), sum(counts)]
                *crops, mask = keep_indices[used : used + sum(sizes)].split(sizes)
                used += sum(sizes)
                samples = KeptSamples(tuple(crops) if gathers else None, mask, inner, 1 / (1 - rate))
                pair.append(without_dropped(samples) if shapes_may_change else samples)
            result.append((pair[0], pair[1]))
        return result

    def position_embedding(self, height: int, width: int) -> Tensor:
        """The table `[1, 1 + h*w, embed_dim]` for a grid of h x w patches, bicubically interpolated.

        As in the original, the scale factor handed to the interpolation is (h + 0.1) / (table's height), which moves
        the sample points a little; released weights expect it. Bicubic interpolation is linear and separable, so it is
        two small matrix products with constant matrices: exact gradients to the table, and repeatable on a GPU.
        """
        if (height, width) == self.grid:
            return self.pos_embed
        return self.resampled(height, width, bicubic_matrix)

    def resampled(self, height: int, width: int, matrix: Callable[[int, int], Tensor]) -> Tensor:
        """The table for another grid; `matrix(source, target)` interpolates along one side."""
        rows, columns = self.grid
        dim = self.embed_dim
        with torch.autocast(self.pos_embed.device.type, enabled=False):
            table = self.pos_embed[0, 1:].reshape(rows, columns * dim)
            down = _placed(matrix, rows, height, table)  # [h, rows]
            across = _placed(matrix, columns, width, table)  # [w, columns]
            grid = across @ (down @ table).reshape(height, columns, dim)  # [h, w, dim]
            return torch.cat((self.pos_embed[:, :1], grid.reshape(1, height * width, dim)), dim=1)

    def _tokens(self, images: Sequence[Tensor]) -> tuple[Tensor, Packing]:
        """Images of one or several sizes -> tokens with their positions, [tokens, embed_dim], and where they lie."""
        grids = [self._grid_of(x) for x in images]
        first = 1 + self.registers
        packing = pack([(len(x), first + h * w) for x, (h, w) in zip(images, grids, strict=True)], images[0].device)
        patches = self.patch_embed(images, packing)
        # One row for every token: its position, plus the class token or the patches' bias.
        tables = []
        for (n, _), grid in zip(packing.groups, grids, strict=True):
            position = self.position_embedding(*grid)
            rows = (self._leading(position), position[:, 1:] + cast(Tensor, self.patch_embed.proj.bias))
            tables.append(torch.cat(rows, dim=1).expand(n, -1, -1).flatten(0, 1))
        return torch.addmm(joined(tables), patches, self.patch_embed.proj.weight.flatten(1).t()), packing

    def _leading(self, position: Tensor) -> Tensor:
        """The tokens before the patches, `[1, 1 + registers, embed_dim]`."""
        return self.cls_token + position[:, :1]

    def _grid_of(self, x: Tensor) -> tuple[int, int]:
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise UserError(
                f"the backbone takes [B, {self.in_chans}, H, W], got {list(x.shape)}; "
                "build it with in_chans equal to the images' channels"
            )
        return grid_of(x.shape[-2], x.shape[-1], self.patch_size)


def _call(block: nn.Module, *inputs: Any) -> Tensor:
    return cast(Tensor, block(*inputs))


class PatchEmbed(nn.Module):
    """Images `[B, C, H, W]` of several sizes -> `[tokens, C * patch * patch]`: each patch's pixels as a row.

    Rows of tokens that are no patches are zeros. `proj` is a convolution by its names in the state dict; its weight is
    used as a matrix.
    """

    def __init__(self, patch_size: int, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Sequence[Tensor], packing: Packing) -> Tensor:
        """Copies the patches of all images into one new buffer."""
        weight, size = self.proj.weight, self.proj.weight.shape[-1]
        tokens = sum(n * length for n, length in packing.groups)
        buffer = weight.new_zeros(tokens, weight[0].numel())  # also a cast, where the images are of another dtype
        start = 0
        for x, (n, length) in zip(images, packing.groups, strict=True):
            cut = x.unflatten(3, (-1, size)).unflatten(2, (-1, size)).permute(0, 2, 4, 1, 3, 5)  # [B, h, w, C, ...]
            rows = buffer[start : start + n * length].view(n, length, -1)
            rows[:, length - cut.shape[1] * cut.shape[2] :].view(cut.shape).copy_(cut)
            start += n * length
        return buffer


class Linear(nn.Linear):
    """PyTorch's, with products by `dino_fast.ops.linear.matmul`; of `norm(input)` where there is a norm."""

    def forward(self, input: Tensor, norm: nn.LayerNorm | None = None) -> Tensor:
        """`[rows, in]`, of which `norm` is taken first -> `[rows, out]`."""
        return linear(input, self.weight, self.bias, norm_of(norm))


def norm_of(module: nn.LayerNorm | None) -> Norm | None:
    """The layer norm of a module as operations take it."""
    return None if module is None else Norm(module.weight, module.bias, module.eps)


class Attention(nn.Module):
    """Multi-head self-attention over the tokens of each image; queries, keys and values are one linear layer."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, packing: Packing, cls_only: bool = False, norm: nn.LayerNorm | None = None) -> Tensor:
        """`[tokens, C]`, of which `norm` is taken first -> `[tokens, C]`.

        With `cls_only` the result is made for the first token of every image alone, `[images, C]`.
        """
        if not cls_only:
            qkv = self.qkv(x, norm).unflatten(1, (3, self.num_heads, -1))
            return cast(Tensor, self.proj(attend(qkv, packing)))
        dim, bias = x.shape[1], self.qkv.bias
        bias_q, bias_kv = (None, None) if bias is None else bias.split([dim, 2 * dim])
        weight_q, weight_kv = self.qkv.weight.split([dim, 2 * dim])
        q = linear(packing.first(x), weight_q, bias_q, norm_of(norm)).unflatten(1, (self.num_heads, -1))
        kv = linear(x, weight_kv, bias_kv, norm_of(norm)).unflatten(1, (2, self.num_heads, -1))
        return cast(Tensor, self.proj(attend_first(q, kv, packing)))

    def probabilities(self, x: Tensor) -> Tensor:
        """`[B, N, C]` -> softmax(q k^T / sqrt(d)), `[B, H, N, N]`."""
        q, k, _ = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return cast(Tensor, (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1))


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor, norm: nn.LayerNorm | None = None) -> Tensor:
        """`[rows, dim]`, of which `norm` is taken first -> `[rows, dim]`."""
        return mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias, norm_of(norm))


class Block(nn.Module):
    """Attention and MLP, each after a layer norm and added to its input."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, qkv_bias: bool, drop_path_rate: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path_rate)

    def forward(
        self,
        x: Tensor,
        packing: Packing,
        kept_samples: tuple[KeptSamples, KeptSamples] | None = None,
        cls_only: bool = False,
    ) -> Tensor:
        """`[tokens, C]` -> `[tokens, C]`; with `cls_only` the first token of every image alone, `[images, C]`.

        `kept_samples` are the images that attention and MLP are computed for and added to; the others' tokens pass by.
        """
        residual, out_packing = x, packing
        if cls_only:
            residual = packing.first(x)
            out_packing = packing._replace(groups=tuple((n, 1) for n, _ in packing.groups))
        if kept_samples is None:
            residual = residual + self.attention_branch(x, packing, cls_only)
            return residual + self.mlp_branch(residual)
        attended, transformed = kept_samples
        branch = self.attention_branch(take(x, packing, attended), attended.packing, cls_only)
        residual = add_to_kept(residual, branch, out_packing, attended)
        branch = self.mlp_branch(take(residual, out_packing, transformed))
        return add_to_kept(residual, branch, out_packing, transformed)

    def attention_branch(self, x: Tensor, packing: Packing, cls_only: bool) -> Tensor:
        """The attention's contribution to the residual stream."""
        return cast(Tensor, self.attn(x, packing, cls_only, self.norm1))

    def mlp_branch(self, x: Tensor) -> Tensor:
        """The MLP's contribution to the residual stream."""
        return cast(Tensor, self.mlp(x, self.norm2))


class DropPath(nn.Module):
    """The stochastic depth of a block: an image's branch is dropped with probability `rate`.

    Draws are hashes of a seed, of how many draws came before and of images' numbers: they depend on nothing else that
    draws, are the same on every device, and an image's own needs none of the others'.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.reseed(0)

    def reseed(self, seed: int) -> None:
        """Starts the sequence of draws of `seed`."""
        self.seed, self.draws = seed, 0

    @torch.compiler.disable  # type: ignore[misc, untyped-decorator]
    def draw(self, counts: Sequence[int], numbers: np.ndarray[Any, Any]) -> Tensor:
        """One branch's keep indices for groups of `counts` images, numbered one group after the other.

        Returns int64 on the CPU: a mask of all images, 1 where the branch is kept; from a rate of `GATHER_FROM` on, the
        indices of the images that it is computed for, ascending, group by group, and a mask of these.
        """
        seed = derive_seed(self.seed, self.draws)
        self.draws += 1
        chances = uniform(seed, numbers)
        if self.rate < GATHER_FROM:
            return torch.tensor(chances >= self.rate, dtype=torch.int64, device="cpu")
        crops, masks, start = [], [], 0
        for n in counts:
            count = computed_count(n, self.rate)
            taken = chances[start : start + n].argsort(kind="stable")[:count]  # in random order
            last = numbers[start + taken[count - 1 :]]
            mask = np.ones(count, dtype=np.int64)
            mask[count - 1 :] = uniform(derive_seed(seed, 1), last) < n * (1 - self.rate) - (count - 1)
            order = taken.argsort()
            crops.append(taken[order])
            masks.append(mask[order])
            start += n
        return torch.tensor(np.concatenate(crops + masks), dtype=torch.int64, device="cpu")

    def extra_repr(self) -> str:
        """The rate, for `print(model)`."""
        return f"rate={self.rate:.3f}"


def set_drop_path_seed(module: nn.Module, seed: int, step: int) -> None:
    """Makes every draw of stochastic depth in `module` until the next call a function of (seed, step, block)."""
    layers = [layer for layer in module.modules() if isinstance(layer, DropPath)]
    for block, layer in enumerate(layers):
        layer.reseed(derive_seed(seed, step, block))


def uniform(seed: int, numbers: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """For each whole number a float64 in [0, 1): that draw of the generator splitmix64 started at `seed`."""
    state = np.asarray(numbers).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state += np.uint64((seed + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state ^= state >> np.uint64(31)
    return (state >> np.uint64(11)) * 2.0**-53  # type: ignore[no-any-return]


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


def _placed(matrix: Callable[[int, int], Tensor], source: int, target: int, like: Tensor) -> Tensor:
    """`matrix(source, target)` as `like` is; to a GPU it is copied once, since the host waits for such a copy."""
    if not like.is_cuda or type(like) is not Tensor:
        return matrix(source, target).to(like)
    return _cached_on_gpu(matrix, source, target, like.device, like.dtype)


@functools.lru_cache(maxsize=64)
def _cached_on_gpu(
    matrix: Callable[[int, int], Tensor], source: int, target: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    with torch.inference_mode(False):
        return matrix(source, target).to(device, dtype)


@functools.cache
def bicubic_matrix(source: int, target: int) -> Tensor:
    """Float64 `[target, source]`: bicubic interpolation with the scale factor (target + 0.1) / source, as a matrix."""
    scale = (target + 0.1) / source
    with torch.no_grad(), torch.inference_mode(False):
        eye = torch.eye(source, dtype=torch.float64, device="cpu").view(
            1, source, source, 1
        )  # one channel a source row
        out = F.interpolate(eye, scale_factor=(scale, 1.0), mode="bicubic")  # [1, source, target, 1]
        return out.view(source, target).T.contiguous()


def init_linear(module: nn.Module) -> None:
    """Linear layers: normal of standard deviation 0.02 cut at ±2, zero bias."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
