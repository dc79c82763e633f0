"""Operation multi_crop: the native backend against the installed Pillow on every instruction set.

Every pixel must be the same one of 256 levels, which is far more than the operation's tolerance asks for (99.9 % within
2/255, a mean difference below 0.5/255).
"""

from __future__ import annotations

import multiprocessing
import os
import tarfile
import threading
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dino_fast import _C
from dino_fast.augment import CropParams, MultiCrop
from dino_fast.backends import BackendError
from dino_fast.cli import info
from dino_fast.data.decode import decode
from dino_fast.ops.multi_crop import from_pillow, multi_crop, to_pillow
from dino_fast.ops.multi_crop.tables import planar

SMALL = {"global_size": 48, "local_size": (20, 37), "n_local": 3, "mean": (0.5,), "std": (0.25,)}
OFF = {"flip_p": 0.0, "jitter_p": 0.0, "grey_p": 0.0, "blur_p": (0.0, 0.0, 0.0), "solarize_p": (0.0, 0.0, 0.0)}
CASES = {
    "crop": {},
    "flip": {"flip_p": 1.0},
    "brightness": {"jitter_p": 1.0, "jitter": (0.9, 0.0, 0.0, 0.0)},
    "contrast": {"jitter_p": 1.0, "jitter": (0.0, 0.9, 0.0, 0.0)},
    "saturation": {"jitter_p": 1.0, "jitter": (0.0, 0.0, 0.9, 0.0)},
    "hue": {"jitter_p": 1.0, "jitter": (0.0, 0.0, 0.0, 0.5)},
    "grey": {"grey_p": 1.0},
    "blur": {"blur_p": (1.0, 1.0, 1.0)},
    "wide blur": {"blur_p": (1.0, 1.0, 1.0), "blur_radius": (0.0, 12.0)},
    "solarize": {"solarize_p": (1.0, 1.0, 1.0)},
    "grey and blur": {"grey_p": 1.0, "blur_p": (1.0, 1.0, 1.0)},
}


@pytest.fixture(params=_C.supported_isas())
def isa(request):
    """Each instruction set that this machine can run, in turn."""
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


def pictures(channels: int, *extents: tuple[int, int]) -> list[torch.Tensor]:
    """Smooth gradients with noise of all sizes, so that every operation meets many colours."""
    images = []
    for seed, (height, width) in enumerate(extents):
        rng = np.random.default_rng(seed)
        y, x = np.mgrid[:height, :width] / max(height, width)
        waves = [128 + 90 * np.sin(3 * x * (c + 1) + 5 * y + c) for c in range(channels)]
        noisy = np.stack(waves) + rng.normal(0, 30, (channels, height, width))
        images.append(torch.from_numpy(noisy.clip(0, 255).astype(np.uint8)))
    return images


def assert_equals_pillow(crops: MultiCrop, images: list[torch.Tensor], seed: int = 0) -> None:
    params = crops.sample(len(images), torch.Generator().manual_seed(seed))
    ours, theirs = (crops.apply(images, params, backend=backend) for backend in ("native", "reference"))
    std = crops.statistics(len(images[0]))[1]
    for got, wanted in zip(ours, theirs, strict=True):
        assert got.shape == wanted.shape and got.dtype == wanted.dtype == torch.float32
        if got.numel() == 0:
            continue
        levels = ((got - wanted) * std * 255).abs()
        assert levels.max() < 1e-3


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("case", [*CASES, "chain"])
def test_equals_pillow(case, channels, isa):
    crops = MultiCrop(**SMALL, **({} if case == "chain" else OFF | CASES[case]))
    images = pictures(channels, (61, 83), (120, 40), (28, 28), (32, 32)) * (6 if case == "chain" else 2)
    assert_equals_pillow(crops, images)


@pytest.mark.parametrize("extents", [[(1, 1)], [(1, 50)], [(30000, 20)], [(20, 30000)], [(500, 375)]])
def test_extreme_sizes(extents, isa):
    assert_equals_pillow(MultiCrop(**SMALL), pictures(3, *extents))


@pytest.mark.parametrize("channels", [2, 4, 16])
def test_other_channel_counts(channels, isa):
    assert_equals_pillow(MultiCrop(**SMALL), pictures(channels, (40, 50), (33, 20)))


def test_crops_of_few_pixels_blurred_beyond_their_edges(isa):
    crops = MultiCrop(global_size=(3, 1), local_size=2, n_local=2, blur_p=(1, 1, 1), blur_radius=(3.0, 9.0))
    assert_equals_pillow(crops, pictures(3, (30, 30)))


def test_every_colour(isa):
    """Hue and saturation of 2^21 colours: every other level of each channel, by chance the odd or the even ones."""
    levels = np.arange(0, 256, 2)
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij")).reshape(3, 1024, 2048)
    odd = np.random.default_rng(0).integers(0, 2, grid.shape)
    image = torch.from_numpy((grid + odd).astype(np.uint8))
    crops = MultiCrop(
        global_size=(1024, 2048), n_local=0, global_scale=(1.0, 1.0), ratio=(2.0, 2.0), jitter_p=1.0,
        jitter=(0.0, 0.0, 0.9, 0.5), flip_p=0.0, grey_p=0.0, blur_p=(0, 0, 0), solarize_p=(0, 0, 0),
    )  # fmt: skip
    assert_equals_pillow(crops, [image])


@pytest.fixture(scope="module")
def photographs() -> list[torch.Tensor]:
    root = Path(os.environ.get("DINO_FAST_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
    if not (root / "caltech101.tar").exists():
        pytest.skip(f"no photographs: {root / 'caltech101.tar'} is absent (DINO_FAST_TEST_DATA names the folder)")
    with tarfile.open(root / "caltech101.tar") as tar:
        names = [name for name in tar.getnames() if name.endswith(".jpg")][::300]
        images = [decode(tar.extractfile(name).read(), 3) for name in names]  # type: ignore[union-attr]
    assert len(images) >= 10
    return images


@pytest.mark.parametrize("case", [*CASES, "chain"])
def test_photographs(case, photographs):
    assert_equals_pillow(MultiCrop(**({} if case == "chain" else OFF | CASES[case])), photographs)


@pytest.mark.parametrize("may", [True, False])
@pytest.mark.parametrize(("extent", "down_first"), [((90, 50), True), ((90, 70), False), ((40, 30), False)])
def test_order_of_the_passes(extent, down_first, may, isa, monkeypatch):
    """Columns are resized before rows where the height loses more than twice what the width does, else rows before; as
    before Pillow 13, rows always before."""
    monkeypatch.setattr("dino_fast.ops.multi_crop.tables.MAY_GO_DOWN_FIRST", may)
    height, width = 48, 40
    image = pictures(3, extent)[0]
    crops = MultiCrop(global_size=(height, width), n_local=0, **OFF)
    params = crops.sample(1, torch.Generator().manual_seed(0))
    monkeypatch.setattr(MultiCrop, "boxes", lambda *_: np.tile([0, 0, *extent], (1, 2, 1)))
    between = (extent[1], height) if down_first and may else (width, extent[0])
    bicubic = Image.Resampling.BICUBIC
    wanted = from_pillow([to_pillow(image)[0].resize(between, bicubic).resize((width, height), bicubic)])
    mean, std = crops.statistics(3)
    got = crops.apply([image], params, backend="native")[0][0, 0] * std + mean
    assert torch.equal((got * 255).round().to(torch.uint8), wanted)


def test_every_instruction_set_gives_the_same_bits():
    crops, images, before, results = MultiCrop(**SMALL), pictures(3, (61, 83), (120, 40), (28, 28)) * 4, _C.isa(), []
    params = crops.sample(len(images), torch.Generator().manual_seed(1))
    try:
        for name in _C.supported_isas():
            _C.set_isa(name)
            results.append(crops.apply(images, params, backend="native"))
    finally:
        _C.set_isa(before)
    assert len(results) > 1
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_bfloat16_is_float32_rounded(backend, isa):
    crops, images = MultiCrop(**SMALL), pictures(3, (61, 83), (120, 40))
    params = crops.sample(2, torch.Generator().manual_seed(2))
    whole = crops.apply(images, params, backend=backend)
    half = crops.apply(images, params, dtype=torch.bfloat16, backend=backend)
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(whole, half, strict=True))
    with pytest.raises(ValueError, match="bfloat16"):
        crops.apply(images, params, dtype=torch.float16, backend=backend)


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("case", [*CASES, "chain"])
def test_floats_are_8_bits_without_the_rounding(case, channels):
    """Of whole levels the float path makes what Pillow makes, but for the rounding after each of up to ten steps."""
    crops = MultiCrop(**SMALL, **({} if case == "chain" else OFF | CASES[case]))
    images = pictures(channels, (61, 83), (120, 40), (28, 28), (32, 32))
    params = crops.sample(4, torch.Generator().manual_seed(3))
    rounded = crops.apply(images, params, backend="reference")
    exact = crops.apply([image.float() for image in images], params)
    std = crops.statistics(channels)[1]
    for a, b in zip(rounded, exact, strict=True):
        levels = ((a - b) * std * 255).abs()
        # 8-bit HSV has 255 steps of hue and of saturation, and a contrast multiplies the rounding before it.
        hue = channels == 3 and case in ("hue", "chain")
        assert levels.median() < (2 if hue else 1) and levels.mean() < (4 if hue else 1)


def test_of_16_bits_all_are_used():
    crops = MultiCrop(48, 24, 2, mean=(0.0,), std=(1.0,), **OFF)
    ramp = torch.arange(65536, dtype=torch.int32).view(1, 256, 256)
    params = crops.sample(1, torch.Generator().manual_seed(2))
    wide = crops.apply([ramp.to(torch.uint16)], params)
    assert wide[0].unique().numel() > 4000  # of 4608 pixels; the high bytes alone gave 256
    same = crops.apply([ramp.float() / 257], params)
    assert all(torch.equal(a, b) for a, b in zip(wide, same, strict=True))
    mixed = crops.apply([ramp.to(torch.uint16), (ramp >> 8).to(torch.uint8)], CropParams.concatenate([params, params]))
    assert torch.equal(mixed[0][:, :1], wide[0]) and (mixed[0][:, 1] - wide[0][:, 0]).abs().max() < 1 / 250


def test_native_code_refuses_floats_by_name():
    crops = MultiCrop(**SMALL)
    with pytest.raises(BackendError, match="takes uint8 images"):
        crops.apply([torch.zeros(3, 9, 9)], crops.sample_each([0]), backend="native")
    with pytest.raises(ValueError, match="all of one kind"):
        multi_crop_of(crops, [torch.zeros(3, 9, 9), torch.zeros(3, 9, 9, dtype=torch.uint8)])


def multi_crop_of(crops, images):
    """The operator itself, which converts nothing."""
    table = crops.crop_table(crops.sample_each([0] * len(images)), [tuple(image.shape[1:]) for image in images])
    mean, std = (x.flatten() for x in crops.statistics(3))
    return multi_crop(images, *table, 2, [48, 48], [20, 37], mean, std)


def test_choice_of_backend(monkeypatch):
    crops, images = MultiCrop(**SMALL), pictures(3, (61, 83))
    params = crops.sample(1, torch.Generator().manual_seed(2))
    assert info.collect()["operations"]["multi_crop"]["cpu"]["chosen"] == "native"
    called = []
    monkeypatch.setattr("dino_fast.ops.multi_crop.multi_crop_reference", lambda *_: called.append(1))
    crops.apply(images, params)
    assert not called
    crops.apply(images, params, backend="reference")
    monkeypatch.setenv("DINO_FAST_BACKEND", "multi_crop=reference")
    crops.apply(images, params)
    assert len(called) == 2
    with pytest.raises(BackendError, match="native, cuda, reference"):
        crops.apply(images, params, backend="triton")


def test_other_threads_run_meanwhile():
    crops, images = MultiCrop(), pictures(3, (600, 800)) * 60
    params = crops.sample(len(images), torch.Generator().manual_seed(2))
    thread = threading.Thread(target=lambda: (torch.set_num_threads(1), crops.apply(images, params, backend="native")))
    thread.start()
    ticks = 0
    while thread.is_alive():
        time.sleep(1e-4)
        ticks += 1
    assert ticks > 50  # holding the interpreter's lock, the native call would let through a handful


def test_any_number_of_threads_and_a_strided_image_give_the_same_bits():
    crops = MultiCrop(**SMALL)
    images = pictures(3, (61, 83), (120, 40), (28, 28))
    params = crops.sample(3, torch.Generator().manual_seed(1))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = crops.apply(images, params)
        torch.set_num_threads(3)
        strided = [image.permute(1, 2, 0).contiguous().permute(2, 0, 1) for image in images]
        three = crops.apply(strided, params)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def _send(queue, images, params):
    queue.put(MultiCrop(**SMALL).apply(images, params)[0].numpy())


@pytest.mark.parametrize("pixels", [(1, 1), (5, 7), (37, 64), (61, 83)])
def test_pixels_side_by_side_become_planes(pixels, isa):
    image = pictures(3, pixels)[0]
    interleaved = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    made = planar(interleaved)
    assert made.is_contiguous() and torch.equal(made, image) and planar(image) is image
    assert torch.equal(planar(interleaved[:, :, 1:]), image[:, :, 1:])


def test_survives_a_fork():
    crops = MultiCrop(**SMALL)
    images = pictures(3, (61, 83), (120, 40))
    params = crops.sample(2, torch.Generator().manual_seed(1))
    here = crops.apply(images, params)[0]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_send, args=(queue, images, params))
    child.start()
    there = queue.get(timeout=30)
    child.join()
    assert np.array_equal(here.numpy(), there)


def test_opcheck_and_refusals():
    images = pictures(3, (20, 30), (8, 9))
    n, V = 2, 3
    boxes = torch.tensor([0, 0, 8, 9]).expand(n, V, 4).contiguous()
    rest = (torch.ones(n, V, 4, dtype=torch.bool), torch.arange(4).expand(n, V, 4).contiguous(),
            torch.full((n, V, 4), 0.4), torch.ones(n, V))  # fmt: skip
    sizes = (2, [8, 8], [4, 4], torch.zeros(3), torch.ones(3))
    operator = torch.ops.dino_fast.multi_crop.default
    torch.library.opcheck(operator, (images, boxes, *rest, *sizes))
    with pytest.raises(ValueError, match="outside its image"):
        operator(images, boxes + 1, *rest, *sizes)
    with pytest.raises(ValueError, match="order"):
        operator(images, boxes, rest[0], rest[1] + 1, *rest[2:], *sizes)
    for bad, message in (
        (([], boxes, *rest, *sizes), "no images"),
        ((images, boxes[0], *rest, *sizes), r"boxes is \[3, 4\]; \[2, crops, 4\]"),
        ((images, boxes[:1], *rest, *sizes), r"\[2, crops, 4\] is needed"),
        ((images, boxes.double(), *rest, *sizes), "boxes is torch.float64"),
        ((images, boxes, rest[0].int(), *rest[1:], *sizes), "switches is torch.int32"),
        (([images[0], images[1].float()], boxes, *rest, *sizes), "images are uint8"),
        (([torch.zeros(17, 20, 30, dtype=torch.uint8)] * 2, boxes, *rest, *sizes), "17 channels"),
        ((images, boxes, *rest, 4, *sizes[1:]), "n_global is 4"),
        ((images, boxes, *rest, 2, [8, 0], *sizes[2:]), r"global_size is \[8, 0\]"),
    ):
        with pytest.raises(ValueError, match=message):
            operator(*bad)
        meta = [[x.to("meta") for x in part] if isinstance(part, list) and part and isinstance(part[0], torch.Tensor)
                else part.to("meta") if isinstance(part, torch.Tensor) else part for part in bad]  # fmt: skip
        if "boxes is torch" not in message and "switches" not in message:  # kinds are checked where they are read
            with pytest.raises(ValueError, match=message):
                operator(*meta)


def test_crops_are_written_only_where_they_fit():
    crops = MultiCrop(24, 12, 2)
    images = pictures(3, (40, 50), (30, 30))
    table = crops.crop_table(crops.sample(2, torch.Generator().manual_seed(0)), [(40, 50), (30, 30)])
    expected = crops.crop(images, table)

    def written(*shapes, dtypes=(torch.float32, torch.float32)):
        out = tuple(torch.full(shape, float("nan"), dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True))
        return crops.crop(images, table, out=out)

    right = (2, 2, 3, 24, 24), (2, 2, 3, 12, 12)
    assert all(map(torch.equal, written(*right), expected))
    for shapes, message in (
        (((2, 1, 3, 24, 24), right[1]), "global crops to write"),
        ((right[0], (2, 2, 1, 12, 12)), "local crops to write"),
        ((right[0], (1, 2, 3, 12, 12)), "2 global and 1 local"),
        (((2, 2, 3, 24), right[1]), "global crops to write"),
    ):
        with pytest.raises(ValueError, match=message):
            written(*shapes)
    with pytest.raises(ValueError, match="of one dtype"):
        written(*right, dtypes=(torch.float32, torch.bfloat16))
    with pytest.raises(ValueError, match="contiguous"):
        crops.crop(images, table, out=(torch.zeros(2, 2, 3, 24, 24).transpose(0, 1), torch.zeros(right[1])))


def test_encoded_photograph_in_grey():
    buffer = BytesIO()
    Image.fromarray(pictures(3, (90, 70))[0].permute(1, 2, 0).numpy()).save(buffer, "JPEG")
    assert_equals_pillow(MultiCrop(**SMALL), [decode(buffer.getvalue(), 1)])
