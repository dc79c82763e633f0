"""Multi-crop on a CPU: JPEG files to 2 x 224 + 8 x 96 crops, small images to 2 x 32 + 8 x 16, two threads against one.

Every contender gets the same parameters, drawn beforehand. The original is its own pipeline on Pillow images;
torchvision v2 and kornia do the same steps on tensors, crop by crop, each in its own arithmetic (hue in float, a true
Gaussian of 9 pixels as the original's successor has it, kornia a Gaussian before it shrinks). Ours is refused unless
99.9 % of the pixels are within 2/255 of Pillow and the mean difference is below 0.5/255, a peer unless its mean
difference is below 6/255. `error` is that mean difference of pixels in 0..1, the worse of global and local crops.

An image of 300 x 240 in three channels is 0.2 MB in and 2.1 MB of float32 out (the floor); between lie 8 M
multiply-adds to resize, 0.5 M values through each of four colour operations, and six passes of the blur.

`gpu_rows` times the operation on a GPU: decoded photographs of 500 x 375 that lie there, to 2 x 224 + 8 x 96 crops,
with events on the stream. Where each crop lies is worked out beforehand, as the loader's workers do. kornia is also
timed as its users have it, a module for a whole batch, which draws numbers of its own and whose result is therefore not
compared.

Photographs: caltech101.tar in $DINO_FAST_TEST_DATA or ../shared/data; without it, drawn pictures of that size. Rounds
are timed on a machine that may be shared: ratios are of calls in the same round.
"""

from __future__ import annotations

import io
import math
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from dino_fast.augment import CropParams, MultiCrop
from dino_fast.data.decode import decode

from .harness import Comparison, Contender, Row, peer, run_all

Crops = tuple[Tensor, Tensor]
OneCrop = Callable[[Any, "Recipe"], Tensor]  # a whole image and what to do with it -> [3, h, w]
PEER_LIMIT = 6 / 255


class Recipe:
    """One crop's parameters as plain numbers: reading tensors is not what is measured."""

    def __init__(self, crops: MultiCrop, params: CropParams, size: tuple[int, int], i: int, v: int) -> None:
        self.box = tuple(crops.boxes(params[i], [size])[0, v].tolist())  # top, left, height, width
        self.size = crops.global_size if v < 2 else crops.local_size
        self.flip, self.grey = params.flip[i, v].item(), params.grey[i, v].item()
        self.blur, self.solarize = params.blur[i, v].item(), params.solarize[i, v].item()
        self.order = params.order[i, v].tolist() if params.jitter[i, v] else []
        self.factors, self.radius = params.factors[i, v].tolist(), params.radius[i, v].item()
        self.mean, self.std = list(crops.mean), list(crops.std)


def original(image: Image.Image, r: Recipe) -> Tensor:
    """As the original: torchvision's transforms on Pillow images."""
    import torchvision.transforms.functional as f

    image = f.resized_crop(image, *r.box, [r.size, r.size], f.InterpolationMode.BICUBIC)
    image = f.hflip(image) if r.flip else image
    jitter = (f.adjust_brightness, f.adjust_contrast, f.adjust_saturation, f.adjust_hue)
    for operation in r.order:
        image = jitter[operation](image, r.factors[operation])
    image = f.rgb_to_grayscale(image, 3) if r.grey else image
    image = image.filter(ImageFilter.GaussianBlur(r.radius)) if r.blur else image
    image = ImageOps.solarize(image) if r.solarize else image
    return f.normalize(f.to_tensor(image), r.mean, r.std)


def torchvision_v2(image: Tensor, r: Recipe) -> Tensor:
    """uint8 tensors through torchvision.transforms.v2."""
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as f

    image = f.resized_crop(image, *r.box, [r.size, r.size], InterpolationMode.BICUBIC, antialias=True)
    image = f.horizontal_flip(image) if r.flip else image
    jitter = (f.adjust_brightness, f.adjust_contrast, f.adjust_saturation, f.adjust_hue)
    for operation in r.order:
        image = jitter[operation](image, r.factors[operation])
    image = f.rgb_to_grayscale(image, 3) if r.grey else image
    image = f.gaussian_blur(image, [9, 9], [r.radius, r.radius]) if r.blur else image
    image = f.solarize(image, 128) if r.solarize else image
    return f.normalize(f.to_dtype(image, torch.float32, scale=True), r.mean, r.std)


def with_kornia(kornia: ModuleType) -> OneCrop:
    """float32 tensors through kornia's functions (contrast about the mean of the luma, as Pillow)."""
    e = kornia.enhance
    jitter = (
        e.adjust_brightness_accumulative,
        e.adjust_contrast_with_mean_subtraction,
        lambda x, factor: kornia.color.rgb_to_grayscale(x).lerp(x, factor).clamp(0, 1),
        lambda x, factor: e.adjust_hue(x, 2 * math.pi * factor),
    )

    def one_crop(image: Tensor, r: Recipe) -> Tensor:
        top, left, h, w = r.box
        x = image[None, :, top : top + h, left : left + w].float() / 255
        shrinks = h > r.size or w > r.size
        x = kornia.geometry.transform.resize(x, (r.size, r.size), "bicubic", antialias=shrinks).clamp(0, 1)
        x = kornia.geometry.transform.hflip(x) if r.flip else x
        for operation in r.order:
            x = jitter[operation](x, r.factors[operation])
        x = kornia.color.rgb_to_grayscale(x).expand(-1, 3, -1, -1) if r.grey else x
        x = kornia.filters.gaussian_blur2d(x, (9, 9), (r.radius, r.radius), "replicate") if r.blur else x
        x = torch.where(x < 128 / 255, x, 1 - x) if r.solarize else x
        return e.normalize(x, torch.tensor(r.mean, device=x.device), torch.tensor(r.std, device=x.device))[0]

    return one_crop


def pillow_image(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def torchvision_image(data: bytes) -> Tensor:
    """uint8 [3, H, W]"""
    from torchvision.io import ImageReadMode, decode_jpeg

    return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)


def crop_by_crop(one: OneCrop, images: Callable[[], Sequence[Any]], recipes: list[list[Recipe]]) -> Callable[[], Crops]:
    """`images()` is called anew each time: decoding is part of it."""

    def call() -> Crops:
        made = [[one(image, r) for r in per_image] for image, per_image in zip(images(), recipes, strict=True)]
        by_view = list(zip(*made, strict=True))
        global_crops = torch.stack([torch.stack(view) for view in by_view[:2]])
        return global_crops, torch.stack([torch.stack(view) for view in by_view[2:]])

    return call


class Checked:
    """Compares crops with the reference's, in pixels of 0..1."""

    def __init__(self, crops: MultiCrop, reference: Crops) -> None:
        self.std, self.reference = crops.statistics(3)[1], reference

    def __call__(self, call: Callable[[], Crops], *, strict: bool = False) -> Callable[[], list[Tensor]]:
        def check() -> list[Tensor]:
            """1 + the mean difference, for the harness to compare with 1."""
            means = []
            for got, wanted in zip(call(), self.reference, strict=True):
                difference = ((got.cpu() - wanted) * self.std).abs()
                near = (difference <= 2.001 / 255).double().mean().item()
                if strict and (near < 0.999 or difference.mean() >= 0.5 / 255):
                    raise ValueError(f"{near:.4%} within 2/255, mean difference {difference.mean():.2e}")
                means.append(1 + difference.double().mean())
            return means

        return check


def photographs(n: int) -> tuple[list[bytes], str]:
    """n JPEG files and what they are."""
    beside = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    path = Path(os.environ.get("DINO_FAST_TEST_DATA", beside)) / "caltech101.tar"
    if path.exists():
        with tarfile.open(path) as tar:
            names = [name for name in tar.getnames() if name.endswith(".jpg")]
            chosen = names[:: len(names) // n][:n]
            return [tar.extractfile(name).read() for name in chosen], "Caltech-101"  # type: ignore[union-attr]
    y, x = np.mgrid[:240, :300] / 300
    files = []
    for seed in range(n):
        rng = np.random.default_rng(seed)
        waves = [128 + 90 * np.sin(rng.uniform(5, 20) * x + rng.uniform(5, 20) * y) for _ in range(3)]
        pixels = (np.stack(waves, -1) + rng.normal(0, 10, (240, 300, 3))).clip(0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files, "drawn"


def _comparison(
    shape: str,
    crops: MultiCrop,
    pixels: list[Tensor],
    contenders: Callable[..., list[Contender]],
    device: str = "cpu",
) -> Comparison:
    """`pixels` are the decoded images, `contenders(params, recipes, checked)` makes the calls."""
    params = crops.sample(len(pixels), torch.Generator().manual_seed(0))
    sizes = [(image.shape[1], image.shape[2]) for image in pixels]
    recipes = [[Recipe(crops, params, size, i, v) for v in range(crops.n_crops)] for i, size in enumerate(sizes)]
    checked = Checked(crops, crops.apply(pixels, params, backend="reference"))
    output = sum(t.nbytes for t in checked.reference)
    return Comparison(
        operation="multi_crop",
        shape=shape,
        dtype="float32",
        reference=lambda: [torch.ones(()), torch.ones(())],
        error_limit=PEER_LIMIT,
        floor_bytes=sum(image.nbytes for image in pixels) + output,
        output_bytes=output,
        contenders=contenders(params, recipes, checked),
        device=device,
        seconds=15.0,
    )


def from_jpeg(n: int) -> Comparison:
    files, what = photographs(n)
    crops = MultiCrop()
    pixels = [decode(data, 3) for data in files]

    def contenders(params: CropParams, recipes: list[list[Recipe]], checked: Checked) -> list[Contender]:
        def ours() -> Crops:
            return crops.apply([decode(data, 3) for data in files], params)

        def as_tensors() -> list[Tensor]:
            return [torchvision_image(data) for data in files]

        pil = crop_by_crop(original, lambda: [pillow_image(data) for data in files], recipes)
        v2 = crop_by_crop(torchvision_v2, as_tensors, recipes)
        rows = [
            Contender("dino-fast", ours, ours=True, check=checked(ours, strict=True)),
            Contender("original: Pillow pipeline", pil, baseline=True, check=checked(pil)),
            Contender("torchvision v2 on tensors", v2, check=checked(v2)),
        ]
        kornia = peer("kornia", "kornia", lambda k: crop_by_crop(with_kornia(k), as_tensors, recipes))
        kornia.check = None if kornia.absent else checked(kornia.call)
        return [*rows, kornia]

    return _comparison(f"{n} JPEG, {what}, to 2x224 + 8x96, 1 thread", crops, pixels, contenders)


def small(n: int) -> Comparison:
    """Decoded 32 x 32 images: where a call's overhead counts."""
    crops = MultiCrop(global_size=32, local_size=16)
    files, what = photographs(n)
    pixels = [torch.from_numpy(np.array(pillow_image(d).resize((32, 32)))).permute(2, 0, 1).contiguous() for d in files]

    def contenders(params: CropParams, recipes: list[list[Recipe]], checked: Checked) -> list[Contender]:
        def ours() -> Crops:
            return crops.apply(pixels, params)

        pictures = [Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) for image in pixels]
        pil = crop_by_crop(original, lambda: pictures, recipes)
        v2 = crop_by_crop(torchvision_v2, lambda: pixels, recipes)
        return [
            Contender("dino-fast", ours, ours=True, check=checked(ours, strict=True)),
            Contender("torchvision on Pillow images", pil, baseline=True, check=checked(pil)),
            Contender("torchvision v2 on tensors", v2, check=checked(v2)),
        ]

    return _comparison(f"{n} of 32x32, {what}, to 2x32 + 8x16, 1 thread", crops, pixels, contenders)


def threads(n: int) -> Comparison:
    """The operation alone on one thread and on two, and how much a matrix product gains here: on a machine shared with
    other work, two threads do not have two cores. Each is called once untimed after the number of threads was changed,
    which ends and starts threads: programs keep their number."""
    files, what = photographs(n)
    pixels, crops = [decode(data, 3) for data in files], MultiCrop()

    def contenders(params: CropParams, recipes: list[list[Recipe]], checked: Checked) -> list[Contender]:
        def apply() -> Crops:
            return crops.apply(pixels, params)

        def first(count: int, work: Callable[[], Any]) -> Callable[[], None]:
            def prepare() -> None:
                torch.set_num_threads(count)
                work()

            return prepare

        def on(count: int) -> Callable[[], Crops]:
            def call() -> Crops:
                torch.set_num_threads(count)
                return apply()

            return call

        square = torch.rand(1024, 1024)

        def product() -> None:
            torch.mm(square, square)

        def probe(count: int) -> Contender:
            nothing = [torch.ones(()), torch.ones(())]  # there is nothing to check
            name = f"probe: matrix product, {count} thread{'s' * (count > 1)}"
            return Contender(name, product, check=lambda: nothing, prepare=first(count, product))

        ours, plain = (checked(on(count), strict=True) for count in (2, 1))
        return [
            Contender("dino-fast, 2 threads", apply, ours=True, check=ours, prepare=first(2, apply)),
            Contender("dino-fast, 1 thread", apply, baseline=True, check=plain, prepare=first(1, apply)),
            probe(2),
            probe(1),
        ]

    return _comparison(f"{n} decoded, {what}, to 2x224 + 8x96, 1 and 2 threads", crops, pixels, contenders)


def kornia_batched(kornia: ModuleType, crops: MultiCrop) -> Callable[[Tensor], Crops]:
    """kornia's augmentation modules over a batch float32 [n, 3, H, W] in 0..1, one view after the other."""
    a = kornia.augmentation
    mean, std = torch.tensor(crops.mean), torch.tensor(crops.std)

    def view(size: int, scale: tuple[float, float], blur_p: float, solarize_p: float) -> Any:
        return a.AugmentationSequential(
            a.RandomResizedCrop((size, size), scale=scale, ratio=crops.ratio, resample="bicubic"),
            a.RandomHorizontalFlip(p=crops.flip_p),
            a.ColorJiggle(*crops.jitter, p=crops.jitter_p),
            a.RandomGrayscale(p=crops.grey_p),
            a.RandomGaussianBlur((9, 9), crops.blur_radius, p=blur_p),
            a.RandomSolarize(0.0, 0.0, p=solarize_p),
            a.Normalize(mean, std),
            same_on_batch=False,
        )

    size, small = crops.global_size, crops.local_size
    first, second, local = (
        view(side, scale, p, s)  # type: ignore[arg-type]
        for side, scale, p, s in zip(
            (size, size, small),
            (crops.global_scale, crops.global_scale, crops.local_scale),
            crops.blur_p,
            crops.solarize_p,
            strict=True,
        )
    )

    def call(batch: Tensor) -> Crops:
        views = torch.stack([first(batch), second(batch)])
        return views, torch.stack([local(batch) for _ in range(crops.n_local)])

    return call


def on_gpu(n: int, device: str = "cuda") -> Comparison:
    files, what = photographs(min(n, 64))
    shown = [np.array(pillow_image(data).resize((500, 375))) for data in files]
    pixels = [torch.from_numpy(shown[i % len(shown)]).permute(2, 0, 1).contiguous() for i in range(n)]
    crops = MultiCrop()
    on_device = [image.to(device) for image in pixels]

    def contenders(params: CropParams, recipes: list[list[Recipe]], checked: Checked) -> list[Contender]:
        table = crops.crop_table(params, [(375, 500)] * n)

        def ours() -> Crops:
            return crops.crop(on_device, table)

        v2 = crop_by_crop(torchvision_v2, lambda: on_device, recipes)
        one = peer("kornia, crop by crop", "kornia", lambda k: crop_by_crop(with_kornia(k), lambda: on_device, recipes))
        one.check = None if one.absent else checked(one.call)

        def batched(kornia: ModuleType) -> Callable[[], Crops]:
            call = kornia_batched(kornia, crops)
            return lambda: call(torch.stack(on_device).float().div_(255))

        own = peer("kornia, batched, numbers of its own", "kornia", batched)
        own.check = lambda: [torch.ones(()), torch.ones(())]
        return [
            Contender("dino-fast", ours, ours=True, check=checked(ours, strict=True)),
            Contender("torchvision v2, crop by crop", v2, baseline=True, check=checked(v2)),
            one,
            own,
        ]

    return _comparison(f"{n} of 500x375, {what}, to 2x224 + 8x96", crops, pixels, contenders, device)


def gpu_rows(n: int = 128, *, quick: bool = False, device: str = "cuda", end: float = math.inf) -> list[Row]:
    """The operation on decoded images on a GPU; the notes have images a second. It is one comparison, well before
    `end`."""
    rows = run_all([on_gpu(n, device)], quick=quick)
    for row in rows:
        if row.ms and row.role != "floor":
            row.note = f"{1e3 * n / row.ms:,.0f} images/s"
    return rows


def comparisons(quick: bool = False) -> Iterator[Comparison]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield from_jpeg(2 if quick else 16)
        yield small(8 if quick else 64)
        yield threads(2 if quick else 16)
    finally:
        torch.set_num_threads(before)


def run(quick: bool = False) -> list[Row]:
    return run_all(comparisons(quick), quick=quick)


def test_speed(benchmark, contender):
    benchmark(contender)
