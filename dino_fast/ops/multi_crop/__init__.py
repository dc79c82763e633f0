"""Operation multi_crop: boxes of uint8 images -> resized, distorted, normalised crops.

In this order, with 8 bits after every step: crop and resize (antialiased bicubic), horizontal flip, brightness,
contrast, saturation and hue in the given order, grey, Gaussian blur, solarize at 128, (x / 255 - mean) / std.
Saturation, hue and grey leave images without three channels as they are.

The reference is the installed Pillow, as the published pipeline uses it. The native backend (csrc/cpu/multi_crop.cpp)
gives the same 8 bits on every machine and for any number of threads, and so does the CUDA backend
(csrc/cuda/multi_crop.cu), of the same arithmetic. There is one difference between versions of Pillow, and it follows
the installed one: since 13, boxes that lose far more height than width are resized along their columns first, where
older versions always began with the rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from dino_fast.backends import Backend, choose, cuda_unavailable_reason, native_unavailable_reason, register
from dino_fast.ops import autograd
from dino_fast.ops.multi_crop import cuda, native


def multi_crop(
    images: list[Tensor],
    boxes: Tensor,
    switches: Tensor,
    order: Tensor,
    factors: Tensor,
    radius: Tensor,
    n_global: int,
    global_size: list[int],
    local_size: list[int],
    mean: Tensor,
    std: Tensor,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """V crops of each of n images: global [n_global, n, C, h, w] and local [V - n_global, n, C, h, w] of `dtype`.

    images: n of uint8 [C, H, W], all on the CPU or all on one GPU, where the crops then are; the parameters are CPU
    tensors: boxes [n, V, 4] int64 (top, left, height, width), inside the image; switches [n, V, 4] bool (flip, grey,
    blur, solarize); order [n, V, 4] int64, which of brightness 0, contrast 1, saturation 2 and hue 3
    come one after the other, -1 for none; factors [n, V, 4] float32 of those four (1 leaves as is; hue in turns);
    radius [n, V] float32, the blur's standard deviation in pixels; sizes (height, width); mean and std [C] float32;
    dtype float32 or bfloat16. Raises ValueError for another dtype or device, shapes that disagree and boxes outside
    their image. On a GPU all work is queued on the current stream and nothing is waited for.
    """
    return cast(
        "tuple[Tensor, Tensor]",
        torch.ops.dino_fast.multi_crop(
            images, boxes, switches, order, factors, radius,
            n_global, global_size, local_size, mean, std, dtype, backend,
        ),
    )  # fmt: skip


def multi_crop_into(
    crops: tuple[Tensor, Tensor],
    images: list[Tensor],
    boxes: Tensor,
    switches: Tensor,
    order: Tensor,
    factors: Tensor,
    radius: Tensor,
    mean: Tensor,
    std: Tensor,
    backend: str = "auto",
) -> None:
    """`multi_crop`, its results written to `crops`: contiguous, of the shapes that it returns, on the images' device
    and of one dtype. Raises ValueError for others, and RuntimeError where autograd would have to differentiate them."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in crops):
        raise RuntimeError("multi_crop: the crops to write require gradients; call it under torch.no_grad()")
    if autograd.is_plain(*crops, *images, boxes, switches, order, factors, radius, mean, std):
        _fill(crops, images, boxes, switches, order, factors, radius, mean, std, backend)
        autograd.increment_versions(crops)
        return
    _check_images(images, boxes)
    _check_results(crops, images, boxes.shape[1])
    global_size, local_size = (list(x.shape[3:]) for x in crops)
    made = multi_crop(
        images, boxes, switches, order, factors, radius,
        len(crops[0]), global_size, local_size, mean, std, crops[0].dtype, backend,
    )  # fmt: skip
    for given, crop in zip(crops, made, strict=True):
        given.copy_(crop)


def _run(
    images: list[Tensor],
    boxes: Tensor,
    switches: Tensor,
    order: Tensor,
    factors: Tensor,
    radius: Tensor,
    n_global: int,
    global_size: list[int],
    local_size: list[int],
    mean: Tensor,
    std: Tensor,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    crops = _empty(images, boxes, n_global, global_size, local_size, dtype)
    _fill(crops, images, boxes, switches, order, factors, radius, mean, std, backend)
    return crops


def _fake(images, boxes, switches, order, factors, radius, n_global, global_size, local_size, mean, std,
          dtype=torch.float32, backend="auto"):  # type: ignore[no-untyped-def]  # fmt: skip
    return _empty(images, boxes, n_global, global_size, local_size, dtype)


autograd.define_operator("multi_crop", _run, _fake, alternative="the same distortions written in PyTorch")


def _fill(crops, images, boxes, switches, order, factors, radius, mean, std, backend) -> None:  # type: ignore[no-untyped-def]
    _check_images(images, boxes)
    _check_results(crops, images, boxes.shape[1])
    _check(images, boxes, switches, order, factors, radius, mean, std, crops[0].dtype)
    run = _RUN[choose("multi_crop", *images, backend=backend)]
    run(images, boxes, switches, order, factors, radius, mean, std, *crops)


def _empty(
    images: list[Tensor],
    boxes: Tensor,
    n_global: int,
    global_size: list[int],
    local_size: list[int],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    _check_images(images, boxes)
    (n, V), C = boxes.shape[:2], images[0].shape[0]
    if not 0 <= n_global <= V:
        raise ValueError(f"multi_crop: n_global is {n_global}; the boxes are of {V} crops an image")
    for name, size in (("global_size", global_size), ("local_size", local_size)):
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"multi_crop: {name} is {list(size)}; height and width of at least one pixel are needed")
    return (
        torch.empty(n_global, n, C, *global_size, dtype=dtype, device=images[0].device),
        torch.empty(V - n_global, n, C, *local_size, dtype=dtype, device=images[0].device),
    )


def _check_images(images: list[Tensor], boxes: Tensor) -> None:
    if not images:
        raise ValueError("multi_crop: there are no images")
    for image in images:
        if image.dtype != torch.uint8 or image.dim() != 3 or len(image) != len(images[0]) or 0 in image.shape:
            raise ValueError(
                f"multi_crop: images are uint8 [C, H, W] with one C ({len(images[0])} in the first) and H, W >= 1; "
                f"one is {image.dtype} {list(image.shape)}"
            )
    if len(images[0]) > 16:
        raise ValueError(f"multi_crop: {len(images[0])} channels; 1 to 16 are supported")
    if boxes.dim() != 3 or boxes.shape[0] != len(images) or boxes.shape[2] != 4:
        raise ValueError(f"multi_crop: boxes is {list(boxes.shape)}; [{len(images)}, crops, 4] is needed")


def _check_results(crops: tuple[Tensor, Tensor], images: list[Tensor], V: int) -> None:
    """Raises ValueError for tensors that the backends could not fill whole without writing beside them."""
    n, C = len(images), len(images[0])
    for name, given in zip(("global", "local"), crops, strict=True):
        if given.dim() != 5 or given.shape[1:3] != (n, C) or 0 in given.shape[3:]:
            raise ValueError(
                f"multi_crop: the {name} crops to write are {list(given.shape)}; "
                f"[crops, {n}, {C}, height, width] is needed"
            )
        if given.dtype != crops[0].dtype or given.device != images[0].device or not given.is_contiguous():
            raise ValueError(
                f"multi_crop: the crops to write must be contiguous, of one dtype and on {images[0].device} as the "
                f"images; the {name} ones are {given.dtype} on {given.device}, strides {list(given.stride())}"
            )
    if len(crops[0]) + len(crops[1]) != V:
        raise ValueError(
            f"multi_crop: {len(crops[0])} global and {len(crops[1])} local crops are to be written; "
            f"the boxes are of {V}"
        )


def _check(images, boxes, switches, order, factors, radius, mean, std, dtype) -> None:  # type: ignore[no-untyped-def]
    n, V = len(images), boxes.shape[1]
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"multi_crop: dtype is {dtype}; torch.float32 and torch.bfloat16 are supported")
    if not all(image.device == images[0].device for image in images):
        raise ValueError("multi_crop: the images are on several devices; put them on one")
    for name, given, shape in (
        ("boxes", boxes, (n, V, 4)),
        ("switches", switches, (n, V, 4)),
        ("order", order, (n, V, 4)),
        ("factors", factors, (n, V, 4)),
        ("radius", radius, (n, V)),
        ("mean", mean, (images[0].shape[0],)),
        ("std", std, (images[0].shape[0],)),
    ):
        if tuple(given.shape) != shape:
            raise ValueError(f"multi_crop: {name} is {list(given.shape)}; {list(shape)} is needed")
        if given.device.type != "cpu":
            raise ValueError(f"multi_crop: {name} is on {given.device}; the CPU reads the parameters, keep them there")
    for name, given, kind in (
        ("boxes", boxes, torch.int64),
        ("switches", switches, torch.bool),
        ("order", order, torch.int64),
    ):
        if given.dtype != kind:
            raise ValueError(f"multi_crop: {name} is {given.dtype}; {kind} is needed")
    if int(order.min()) < -1 or int(order.max()) > 3:
        raise ValueError("multi_crop: order has entries other than -1, 0, 1, 2, 3")
    extent = torch.tensor([image.shape[1:] for image in images], dtype=torch.int64, device="cpu")[:, None]  # [n, 1, 2]
    corner, size = boxes[..., :2], boxes[..., 2:]
    if not bool(((corner >= 0) & (size > 0) & (corner + size <= extent)).all()):
        raise ValueError("multi_crop: a box is empty or reaches outside its image")


def multi_crop_reference(images, boxes, switches, order, factors, radius, mean, std, global_crops, local_crops) -> None:  # type: ignore[no-untyped-def]
    """Fills global_crops and local_crops by way of Pillow; the arguments are the operator's."""
    views = [*global_crops.unbind(), *local_crops.unbind()]  # V of [n, C, h, w]
    mean, std = mean.view(-1, 1, 1), std.view(-1, 1, 1)
    on, orders, strengths, radii = switches.tolist(), order.tolist(), factors.tolist(), radius.tolist()
    for i, image in enumerate(images):
        whole = to_pillow(image.cpu())
        for v, (top, left, h, w) in enumerate(boxes[i].tolist()):
            out = views[v][i]
            size = (out.shape[2], out.shape[1])
            area = (left, top, left + w, top + h)
            planes = [plane.crop(area).resize(size, Image.Resampling.BICUBIC) for plane in whole]
            planes = _distort(planes, on[i][v], orders[i][v], strengths[i][v], radii[i][v])
            pixels = from_pillow(planes)
            if on[i][v][3]:
                pixels = torch.minimum(pixels, 255 - pixels)
            out.copy_(pixels.float().div_(255).sub_(mean).div_(std))


def _distort(
    planes: list[Image.Image], switches: list[bool], order: list[int], factors: list[float], radius: float
) -> list[Image.Image]:
    flip, grey, blur, _ = switches
    if flip:
        planes = [plane.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for plane in planes]
    for operation in order:
        if operation >= 0:
            planes = _JITTER[operation](planes, factors[operation])
    if grey and planes[0].mode == "RGB":
        planes = [_grey(planes[0])]
    return [plane.filter(ImageFilter.GaussianBlur(radius)) for plane in planes] if blur else planes


def to_pillow(image: Tensor) -> list[Image.Image]:
    """One RGB image for three channels, else one 8-bit plane a channel (Pillow has no other layout without alpha)."""
    pixels = image.numpy()
    if len(pixels) == 3:
        return [Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))]
    return [Image.fromarray(plane) for plane in pixels]


def from_pillow(planes: list[Image.Image]) -> Tensor:
    """The inverse of `to_pillow`."""
    if planes[0].mode == "RGB":
        return torch.from_numpy(np.asarray(planes[0]).transpose(2, 0, 1).copy())
    return torch.from_numpy(np.stack([np.asarray(plane) for plane in planes]))


def _brightness(planes: list[Image.Image], factor: float) -> list[Image.Image]:
    return [Image.blend(_black(p.mode, p.size), p, factor) for p in planes]


@functools.lru_cache
def _black(mode: str, size: tuple[int, int]) -> Image.Image:
    return Image.new(mode, size, 0)


def _contrast(planes: list[Image.Image], factor: float) -> list[Image.Image]:
    """Towards the mean of the luma, or of all channels where there is no luma."""
    lumas = [p if p.mode == "L" else p.convert("L") for p in planes]
    total = sum(int(np.frombuffer(luma.tobytes(), np.uint8).sum()) for luma in lumas)
    mean = int(total / (len(planes) * planes[0].width * planes[0].height) + 0.5)
    return [Image.blend(Image.new(p.mode, p.size, (mean,) * len(p.mode)), p, factor) for p in planes]


def _saturation(planes: list[Image.Image], factor: float) -> list[Image.Image]:
    return [Image.blend(_grey(p), p, factor) if p.mode == "RGB" else p for p in planes]


def _hue(planes: list[Image.Image], factor: float) -> list[Image.Image]:
    if planes[0].mode != "RGB":
        return planes
    pixels = bytearray(planes[0].convert("HSV").tobytes())
    hue = np.frombuffer(pixels, np.uint8)[::3]
    hue += np.uint8(int(factor * 255) % 256)  # towards zero, then modulo 256, as the original's cast to 8 bits
    return [Image.frombytes("HSV", planes[0].size, pixels).convert("RGB")]


def _grey(image: Image.Image) -> Image.Image:
    return image.convert("L").convert("RGB")


_JITTER: tuple[Callable[[list[Image.Image], float], list[Image.Image]], ...] = (
    _brightness,
    _contrast,
    _saturation,
    _hue,
)


_RUN = {
    "cuda": cuda.multi_crop,
    "native": native.multi_crop,
    "reference": lambda *arguments: multi_crop_reference(*arguments),
}

# Each device has its own; the CPU's first, so that forked workers need not ask for a GPU, which they cannot.
register(
    "multi_crop",
    Backend("native", native_unavailable_reason, native.unsupported_reason),
    Backend("cuda", cuda_unavailable_reason, cuda.unsupported_reason),
    Backend("reference"),
    example=lambda device: (torch.empty((3, 256, 256), dtype=torch.uint8, device=device),),
)
