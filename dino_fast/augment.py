"""Multi-crop: from one image, two global and several local views, each cropped, flipped and distorted at random.

The published augmentation, in its order: random resized crop (bicubic), horizontal flip, colour jitter (brightness,
contrast, saturation, hue in random order), grey, Gaussian blur, solarize, normalise. Two halves: `MultiCrop.sample`
draws every random number as plain tensors that know nothing of the image's size, `MultiCrop.apply` is a function of
images and those numbers alone. Pixels are Pillow's: 8 bits after every operation, antialiased bicubic, 8-bit HSV,
Pillow's blur.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dino_fast.errors import UserError
from dino_fast.ops.multi_crop import multi_crop, multi_crop_into
from dino_fast.ops.multi_crop.tables import CropTable

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Probability of a blur: first global crop, second, local ones. The successors' code has the published ones' complement.
PUBLISHED_BLUR, INVERTED_BLUR = (1.0, 0.1, 0.5), (0.0, 0.9, 0.5)
GLOBALS = 2  # the teacher's views
TRIES = 10  # boxes drawn until one fits into the image, as torchvision's RandomResizedCrop
DRAWS = 4 * TRIES + 14  # uniform numbers a crop
COLOUR = ("saturation", "hue", "grey")  # operations that need red, green and blue
_LUMA = (0.299, 0.587, 0.114)

Cuts = CropTable  # its former name

Size = int | tuple[int, int]


@dataclass(frozen=True)
class CropParams:
    """Every random number of n images with V crops each (global ones first); independent of the images' sizes.

    `p[i]`, `p[a:b]` and `p[[3, 1]]` choose images (and keep the first dimension); `CropParams.concatenate` joins.
    """

    area: Tensor  # [n, V, 10] float32, ten candidates: share of the image's area
    log_ratio: Tensor  # [n, V, 10] float32, log(width / height)
    offset: Tensor  # [n, V, 10, 2] float32 in [0, 1): where the box lies in the room left, vertical and horizontal
    flip: Tensor  # [n, V] bool
    jitter: Tensor  # [n, V] bool
    factors: Tensor  # [n, V, 4] float32: brightness, contrast, saturation (1 leaves as is), hue (turns, 0 leaves as is)
    order: Tensor  # [n, V, 4] int64: the four in the order in which they are applied
    grey: Tensor  # [n, V] bool
    blur: Tensor  # [n, V] bool
    radius: Tensor  # [n, V] float32, standard deviation of the blur in pixels of the crop
    solarize: Tensor  # [n, V] bool

    def __len__(self) -> int:
        return len(self.flip)

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> CropParams:
        rows = slice(index, index + 1 or None) if isinstance(index, int) else index
        return CropParams(**{name: value[rows] for name, value in self.to_dict().items()})

    def to_dict(self) -> dict[str, Tensor]:
        """The tensors by name, ready for safetensors or `torch.save`."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @staticmethod
    def from_dict(tensors: dict[str, Tensor]) -> CropParams:
        """The inverse of `to_dict`."""
        return CropParams(**tensors)

    @staticmethod
    def concatenate(parts: Sequence[CropParams]) -> CropParams:
        """The parameters of all images of `parts`, in order."""
        return CropParams(**{f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(CropParams)})


@dataclass(frozen=True)
class MultiCrop:
    """The crops of a run: sizes, scales and the probability of each operation (defaults: the published ones).

    Sizes are pixels, an int or (height, width). `blur_p` and `solarize_p` hold a probability for the first global crop,
    the second, and the local ones. A probability of 0 switches an operation off, `n_local=0` the local crops. `mean`
    and `std` (of pixels in 0..1) have one entry a channel of the images; a single entry serves all, and three are
    averaged by luma for grey images. Raises UserError for a value out of range.
    """

    global_size: Size = 224
    local_size: Size = 96
    n_local: int = 8
    global_scale: tuple[float, float] = (0.4, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.4)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip_p: float = 0.5
    jitter_p: float = 0.8
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)  # brightness, contrast, saturation, hue
    grey_p: float = 0.2
    blur_p: tuple[float, float, float] = PUBLISHED_BLUR
    blur_radius: tuple[float, float] = (0.1, 2.0)
    solarize_p: tuple[float, float, float] = (0.0, 0.2, 0.0)
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        for name in ("global_size", "local_size"):
            _check(name, getattr(self, name), min(pair(getattr(self, name))) >= 1, "at least one pixel")
        _check("n_local", self.n_local, self.n_local >= 0, "0 or more")
        for name in ("global_scale", "local_scale"):
            low, high = getattr(self, name)
            _check(name, (low, high), 0 < low <= high <= 1, "two shares of the image's area, 0 < low <= high <= 1")
        _check("ratio", self.ratio, 0 < self.ratio[0] <= self.ratio[1], "width / height, 0 < low <= high")
        probabilities = (self.flip_p, self.jitter_p, self.grey_p, *self.blur_p, *self.solarize_p)
        _check("a probability", probabilities, all(0 <= p <= 1 for p in probabilities), "0 to 1")
        for name in ("blur_p", "solarize_p"):
            _check(name, getattr(self, name), len(getattr(self, name)) == 3, "three numbers")
        _check("blur_radius", self.blur_radius, 0 <= self.blur_radius[0] <= self.blur_radius[1], "0 <= low <= high")
        _check("jitter", self.jitter, len(self.jitter) == 4 and min(self.jitter) >= 0, "four strengths, 0 or more")
        _check("jitter's hue", self.jitter[3], self.jitter[3] <= 0.5, "at most 0.5")
        _check("std", self.std, len(self.std) > 0 and min(self.std) > 0, "above 0")

    @property
    def n_crops(self) -> int:
        """Crops of an image, global and local."""
        return GLOBALS + self.n_local

    def skipped(self, channels: int) -> tuple[str, ...]:
        """Names of the operations that are on but cannot apply to images of this many channels (all but 3)."""
        on = (self.jitter_p * self.jitter[2], self.jitter_p * self.jitter[3], self.grey_p)
        return tuple(name for name, strength in zip(COLOUR, on, strict=True) if strength > 0) if channels != 3 else ()

    def sample(self, n: int, generator: torch.Generator) -> CropParams:
        """Draws the parameters of n images from a CPU generator."""
        return self._params(torch.rand(n, self.n_crops, DRAWS, generator=generator, dtype=torch.float32, device="cpu"))

    def sample_each(self, seeds: Sequence[int]) -> CropParams:
        """The concatenation of `sample(1, generator)` over generators seeded by `seeds`, in one go: far cheaper."""
        uniform = torch.empty(len(seeds), self.n_crops, DRAWS, dtype=torch.float32, device="cpu")
        generator = torch.Generator()
        for row, seed in zip(uniform.unbind(), seeds, strict=True):
            row.uniform_(generator=generator.manual_seed(seed))
        return self._params(uniform)

    def _params(self, uniform: Tensor) -> CropParams:
        """[n, V, DRAWS] numbers in [0, 1) -> parameters, each image's a function of its own row."""
        area, log_ratio, y, x, rest = uniform.split((TRIES, TRIES, TRIES, TRIES, 14), dim=-1)
        scales = _floats([self.global_scale] * GLOBALS + [self.local_scale] * self.n_local)  # [V, 2]
        blur_p = _floats([*self.blur_p[:2], *[self.blur_p[2]] * self.n_local])  # [V]
        solarize_p = _floats([*self.solarize_p[:2], *[self.solarize_p[2]] * self.n_local])
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        strength = _floats(self.jitter)
        least = torch.cat([(1 - strength[:3]).clamp(min=0), -strength[3:]])
        most = torch.cat([1 + strength[:3], strength[3:]])
        return CropParams(
            area=torch.lerp(scales[:, :1], scales[:, 1:], area),
            log_ratio=low + (high - low) * log_ratio,
            offset=torch.stack((y, x), dim=-1),
            flip=rest[..., 0] < self.flip_p,
            jitter=rest[..., 1] < self.jitter_p,
            factors=torch.lerp(least, most, rest[..., 2:6]),
            order=rest[..., 6:10].argsort(dim=-1),
            grey=rest[..., 10] < self.grey_p,
            blur=rest[..., 11] < blur_p,
            radius=self.blur_radius[0] + (self.blur_radius[1] - self.blur_radius[0]) * rest[..., 12],
            solarize=rest[..., 13] < solarize_p,
        )

    def boxes(self, params: CropParams, sizes: Sequence[tuple[int, int]]) -> np.ndarray:
        """Boxes [n, V, 4] int64 (top, left, height, width) in images of `sizes` (height, width).

        Each is the first candidate that fits, else the largest centered box within `ratio`, as torchvision's
        RandomResizedCrop.
        """
        extent = np.asarray(sizes, dtype=np.float64).reshape(-1, 1, 1, 2)  # [n, 1, 1, 2]
        area = params.area.double().numpy() * extent[..., 0] * extent[..., 1]  # [n, V, 10]
        aspect = np.exp(params.log_ratio.double().numpy())
        box = np.rint(np.sqrt(np.stack((area / aspect, area * aspect), axis=-1)))  # [n, V, 10, 2] height, width
        fits = ((box > 0) & (box <= extent)).all(-1)  # [n, V, 10]
        first = fits.argmax(-1)[..., None, None]
        corner = np.floor(params.offset.double().numpy() * (extent - box + 1))
        both = np.take_along_axis(np.concatenate((corner, box), axis=-1), first, axis=2)[:, :, 0].astype(np.int64)
        for image, crop in zip(*np.nonzero(~fits.any(-1)), strict=True):
            both[image, crop] = _central_box(sizes[image][0], sizes[image][1], self.ratio)
        return both

    def apply(
        self,
        images: Sequence[Tensor],
        params: CropParams,
        *,
        dtype: torch.dtype = torch.float32,
        backend: str = "auto",
    ) -> tuple[Tensor, Tensor]:
        """Cuts the crops that `params` describes.

        images: n tensors [C, H, W], of any sizes and one C in 1 to 16, on the CPU or on one GPU: uint8, uint16 (0 to
        65535) or float32 (0 to 255). Those of more than 8 bits are not rounded to them. Returns global crops
        [2, n, C, h, w] and local crops [n_local, n, C, h, w] on the same device, normalised, in `dtype` (float32 or
        bfloat16). `backend` is cuda, native, reference (Pillow) or auto. Raises ValueError when images and parameters
        disagree.
        """
        self._check_images(images, params)
        images = _as_one_kind(images)
        table = self.crop_table(params, [(image.shape[1], image.shape[2]) for image in images])
        return self.crop(images, table, dtype=dtype, backend=backend)

    def crop_table(self, params: CropParams, sizes: Sequence[tuple[int, int]]) -> CropTable:
        """The boxes and distortions that `params` describes for images of `sizes` (height, width).

        With the pixels they are all that `crop` needs.
        """
        strength = _floats(self.jitter)
        used = params.jitter[..., None] & (strength > 0)[params.order]  # [n, V, 4]
        return CropTable(
            torch.from_numpy(self.boxes(params, sizes)),
            torch.stack((params.flip, params.grey, params.blur, params.solarize), dim=-1),
            torch.where(used, params.order, -1),
            params.factors,
            params.radius,
        )

    def crop(
        self,
        images: Sequence[Tensor],
        table: CropTable,
        *,
        dtype: torch.dtype = torch.float32,
        backend: str = "auto",
        out: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The second half of `apply`: images, on a CPU or a GPU, and their `crop_table`, on the CPU.

        `out` are tensors to write to, of the shapes that are returned and the dtype that is wanted.
        """
        images, (mean, std) = _as_one_kind(images), self.statistics(images[0].shape[0])
        if out is not None:
            multi_crop_into(out, list(images), *table, mean.flatten(), std.flatten(), backend)
            return out
        return multi_crop(
            list(images),
            *table,
            GLOBALS,
            list(pair(self.global_size)),
            list(pair(self.local_size)),
            mean.flatten(),
            std.flatten(),
            dtype,
            backend,
        )

    cuts, cut = crop_table, crop  # their former names

    def _check_images(self, images: Sequence[Tensor], params: CropParams) -> None:
        if len(images) != len(params) or not images:
            raise ValueError(f"apply: {len(images)} images with the parameters of {len(params)}; give one for each")
        if params.flip.shape[1] != self.n_crops:
            raise ValueError(f"apply: parameters of {params.flip.shape[1]} crops an image; this makes {self.n_crops}")
        channels = images[0].shape[0]
        for image in images:
            good = image.dtype in (torch.uint8, torch.uint16, torch.float32) and image.dim() == 3 and image.numel() > 0
            if not good or image.shape[0] != channels:
                raise ValueError(
                    f"apply: images are uint8, uint16 or float32 (0 to 255) [C, H, W] with one C ({channels} in the "
                    f"first) and H, W >= 1, not {image.dtype} {list(image.shape)}"
                )
        if not 1 <= channels <= 16:
            raise ValueError(f"apply: {channels} channels; 1 to 16 are supported")

    def statistics(self, channels: int) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation as [C, 1, 1] float32 (see the class for how they meet the channels)."""
        return statistics(self.mean, self.std, channels)


def statistics(mean: Sequence[float], std: Sequence[float], channels: int) -> tuple[Tensor, Tensor]:
    """`mean` and `std` for images of so many channels, each [C, 1, 1] float32.

    As given, one for all, or three averaged by luma for gray images. Raises UserError where the lengths do not fit.
    """
    both = []
    for name, given in (("mean", mean), ("std", std)):
        if len(given) == 3 and channels == 1:
            given = (sum(weight * value for weight, value in zip(_LUMA, given, strict=True)),)
        if len(given) not in (1, channels):
            raise UserError(
                f"{name} has {len(given)} entries for images of {channels} channels; give {channels}, or one"
            )
        both.append(_floats([*given] * (channels // len(given))).view(-1, 1, 1))
    return both[0], both[1]


def _floats(values: Sequence[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device="cpu")


def _as_one_kind(images: Sequence[Tensor]) -> list[Tensor]:
    """All uint8 as they are; otherwise all float32 from 0 to 255, into which uint16 from 0 to 65535 is scaled."""
    if all(image.dtype == torch.uint8 for image in images):
        return list(images)
    return [image.float().div_(257) if image.dtype == torch.uint16 else image.float() for image in images]


def _central_box(height: int, width: int, ratio: tuple[float, float]) -> tuple[int, int, int, int]:
    w, h = width, height
    if width / height < ratio[0]:
        h = min(height, max(1, round(width / ratio[0])))
    elif width / height > ratio[1]:
        w = min(width, max(1, round(height * ratio[1])))
    return (height - h) // 2, (width - w) // 2, h, w


def pair(size: Size) -> tuple[int, int]:
    """(height, width) of a size given as one number or two."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _check(name: str, value: object, good: bool, accepted: str) -> None:
    if not good:
        raise UserError(f"crops: {name} is {value}; accepted: {accepted}")
