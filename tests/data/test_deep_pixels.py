"""Files of more than 8 bits, of signed and floating values, of any number of bands; and whole pixels beside broken
metadata."""

from __future__ import annotations

import builtins
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dino_fast.augment import MultiCrop
from dino_fast.data import ImageError, eval_batches, open_source, train_loader
from dino_fast.data.decode import RangeError, decode, examine
from dino_fast.data.inspect import check, describe, draw, pixel_note

from .example_files import picture, save

tifffile = pytest.importorskip("tifffile")
LEVELS = np.arange(4096, dtype=np.uint16).reshape(64, 64)  # 12 bits
COLORS = np.stack((LEVELS, LEVELS[::-1], LEVELS.T), axis=-1)


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png16(values: np.ndarray, *more: bytes) -> bytes:
    """A PNG of 16 bits, [H, W] or [H, W, 2 to 4], with chunks before its pixels."""
    height, width = values.shape[:2]
    count = 1 if values.ndim == 2 else values.shape[2]
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[count]
    rows = values.astype(">u2").reshape(height, -1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def tiff(values: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, values, **({"photometric": "minisblack"} | options))
    return file.getvalue()


def npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def pgm(values: np.ndarray, most: int) -> bytes:
    return b"P5\n# a comment\n%d %d\n%d\n" % (values.shape[1], values.shape[0], most) + values.astype(">u2").tobytes()


@pytest.mark.parametrize(
    "make", [png16, tiff, npy, lambda values: pgm(values, 65535)], ids=["png", "tiff", "npy", "pgm"]
)
def test_twelve_bits_keep_every_level(make) -> None:
    pixels = decode(make(LEVELS), 1)
    assert pixels.shape == (1, 64, 64) and pixels.dtype == torch.float32
    assert pixels.unique().numel() == 4096  # 16 when the high byte was taken
    torch.testing.assert_close(pixels[0], torch.from_numpy(LEVELS.astype(np.float32)) * (255 / 65535))
    whole = decode(make(LEVELS), 1, (0, 4095))
    torch.testing.assert_close(whole[0], torch.from_numpy(LEVELS.astype(np.float32)) * (255 / 4095))
    assert torch.equal(decode(make(LEVELS), 3, (0, 4095)), whole.expand(3, -1, -1))


@pytest.mark.parametrize("make", [png16, lambda x: tiff(x, photometric="rgb"), npy], ids=["png", "tiff", "npy"])
def test_sixteen_bit_color_keeps_every_level(make) -> None:
    pixels = decode(make(COLORS), 3, (0, 4095))
    assert all(plane.unique().numel() == 4096 for plane in pixels)
    torch.testing.assert_close(pixels, torch.from_numpy(COLORS.astype(np.float32)).permute(2, 0, 1) * (255 / 4095))
    gray = decode(make(COLORS), 1, (0, 4095))
    torch.testing.assert_close(gray[0], torch.einsum("chw,c->hw", pixels, torch.tensor([0.299, 0.587, 0.114])))


@pytest.mark.parametrize(
    "data",
    [
        png16(LEVELS, chunk(b"sBIT", b"\x0c")),  # as many writers mean it
        png16(LEVELS << 4, chunk(b"sBIT", b"\x0c")),  # as the standard has it
        tiff(LEVELS, extratags=[(341, 3, 1, 4095, True)]),
        tiff(LEVELS, extratags=[(281, 3, 1, 4095, True)]),
        tiff(4095 - LEVELS, photometric="miniswhite", extratags=[(341, 3, 1, 4095, True)]),
        pgm(LEVELS, 4095),
    ],
    ids=["sBIT, low bits", "sBIT, high bits", "SMaxSampleValue", "MaxSampleValue", "white is zero", "maxval"],
)
def test_the_range_is_what_the_file_states(data: bytes) -> None:
    want = torch.from_numpy(LEVELS.astype(np.float32))
    assert (decode(data, 1)[0] - want * (255 / 4095)).abs().max() < 0.1
    assert (decode(data, 1, (0, 65535)).max() < 17) or data == png16(LEVELS << 4, chunk(b"sBIT", b"\x0c"))


def test_signed_and_floating_values_need_a_range() -> None:
    values = np.linspace(-1000, 3000, 4096, dtype=np.float32).reshape(64, 64)
    values[0, 0], values[0, 1] = np.nan, np.inf
    for made in (
        values,
        np.nan_to_num(values, posinf=0).astype(np.int16),
        np.nan_to_num(values, posinf=0).astype(np.float64),
    ):
        for data in (tiff(made), npy(made)):
            with pytest.raises(RangeError, match=r"--pixel-range LOW HIGH") as caught:
                decode(data, 1)
            assert caught.value.low == pytest.approx(-1000, abs=3) and caught.value.high == pytest.approx(3000, abs=3)
            pixels = decode(data, 1, (-1000, 1000))
            assert pixels.isfinite().all() and pixels[0, 1, 0] == pytest.approx(
                (values[1, 0] + 1000) * 255 / 2000, abs=0.2
            )
            assert pixels[0, -1, -1] == 255  # clipped
    assert decode(tiff(values), 1, (-1000, 1000))[0, 0, 0] == 0  # no number: no data
    with pytest.raises(RangeError, match="uint32"):
        decode(tiff(LEVELS.astype(np.uint32)), 1)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("planes", ["contig", "separate"])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_bands_of_a_tiff(dtype: type, planes: str, compression: str | None) -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, np.iinfo(dtype).max, (9, 11, 5)).astype(dtype)
    stored = values if planes == "contig" else values.transpose(2, 0, 1)
    data = tiff(stored, planarconfig=planes, compression=compression)
    pixels = decode(data, 5)
    assert pixels.dtype == (torch.uint8 if dtype is np.uint8 else torch.float32)
    torch.testing.assert_close(
        pixels.double(), torch.from_numpy(values.transpose(2, 0, 1) * 255.0 / np.iinfo(dtype).max), atol=1e-4, rtol=0
    )
    with pytest.raises(ImageError, match="5 channels, and 3 are read; give --channels 5"):
        decode(data, 3)


def test_pages_of_one_band_are_bands() -> None:
    stack = np.random.default_rng(0).integers(0, 255, (6, 9, 11)).astype(np.uint8)
    assert torch.equal(decode(tiff(stack), 6), torch.from_numpy(stack))
    assert torch.equal(decode(tiff(stack), 1)[0], torch.from_numpy(stack[0]))


def test_channels_of_arrays() -> None:
    values = np.random.default_rng(0).integers(0, 255, (9, 11, 7)).astype(np.uint8)
    want = torch.from_numpy(values.transpose(2, 0, 1).copy())
    assert torch.equal(decode(npy(values), 7), want)
    assert torch.equal(decode(npy(values.transpose(2, 0, 1)), 7), want)
    assert torch.equal(decode(npy(values[..., 0] > 100), 1)[0], (want[0] > 100).byte() * 255)
    assert torch.equal(decode(npy(LEVELS.astype(">u2")), 1), decode(npy(LEVELS), 1))
    for bad in (np.zeros((2, 3, 4, 5), np.uint8), np.zeros(3, np.uint8), np.zeros((4, 4), complex), np.array(["x"])):
        with pytest.raises(ImageError):
            decode(npy(bad), 3)
    with pytest.raises(ImageError, match="cannot be read"):
        decode(npy(np.array([{}], dtype=object)), 3)


def test_opacity_is_read_where_it_is_asked_for() -> None:
    for mode, count in (("LA", 2), ("RGBA", 4)):
        image = picture(mode)
        image.putalpha(77)
        for suffix in ("PNG", "TIFF"):
            data = io.BytesIO()
            image.save(data, suffix)
            pixels = decode(data.getvalue(), count)
            assert torch.equal(pixels, torch.from_numpy(np.array(image)).permute(2, 0, 1))
            assert decode(data.getvalue(), 3).shape[0] == 3 and decode(data.getvalue(), 1).shape[0] == 1
    opaque = io.BytesIO()
    picture("RGB").save(opaque, "JPEG")
    assert (decode(opaque.getvalue(), 4)[3] == 255).all() and (decode(opaque.getvalue(), 2)[1] == 255).all()
    with pytest.raises(ImageError, match="give --channels 3"):
        decode(opaque.getvalue(), 5)
    deep = np.dstack((COLORS, np.full_like(LEVELS, 1000)))
    assert decode(png16(deep), 4)[3].unique().tolist() == pytest.approx([1000 * 255 / 65535])
    assert torch.equal(decode(png16(deep), 3), decode(png16(COLORS), 3))
    infrared = np.dstack((COLORS, LEVELS)).astype(np.uint8)  # no opacity: a fourth band
    data = tiff(infrared, photometric="rgb", extrasamples=[0])
    assert torch.equal(decode(data, 4), torch.from_numpy(infrared).permute(2, 0, 1))


def test_a_missing_reader_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: object) -> object:
        if name in ("tifffile", "pillow_heif"):
            raise ImportError(name)
        return real(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImageError, match="pip install tifffile"):
        decode(tiff(np.zeros((9, 9, 5), np.uint8)), 5)
    assert decode(tiff(LEVELS), 1).unique().numel() == 4096  # Pillow reads that


def test_broken_tiffs_are_image_errors() -> None:
    rng = np.random.default_rng(0)
    for values in (LEVELS, COLORS, np.dstack((COLORS, COLORS)).astype(np.uint8), LEVELS.astype(np.float32)):
        whole = tiff(values)
        for channels in (1, 3, values.shape[2] if values.ndim == 3 else 1):
            for _ in range(60):
                data = bytearray(whole[: rng.integers(20, len(whole) + 1)])
                for _ in range(rng.integers(1, 6)):
                    data[rng.integers(min(300, len(data)))] = rng.integers(256)
                try:
                    assert decode(bytes(data), channels, (0, 4095)).shape[0] == channels
                except ImageError:
                    continue


def test_orientation_of_deep_files() -> None:
    values = np.arange(6, dtype=np.uint16).reshape(2, 3) * 1000
    for orientation, want in ((3, values[::-1, ::-1]), (6, values.T[:, ::-1]), (8, values.T[::-1])):
        for stored in (values, np.dstack([values] * 5)):  # by Pillow, by tifffile
            data = tiff(stored, planarconfig="contig", extratags=[(274, 3, 1, orientation, True)])
            pixels = decode(data, 1 if stored.ndim == 2 else 5)
            torch.testing.assert_close(pixels[0], torch.from_numpy(want.astype(np.float32)) * (255 / 65535))


# ---- metadata ----


def broken_metadata() -> dict[str, bytes]:
    image = picture(size=(64, 48))
    file = io.BytesIO()
    image.save(file, "PNG")
    whole = file.getvalue()
    file = io.BytesIO()
    image.save(file, "JPEG")
    jpeg = file.getvalue()

    def beside(name: bytes, body: bytes) -> bytes:
        return whole[:33] + chunk(name, body) + whole[33:]

    def app1(body: bytes) -> bytes:
        return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + jpeg[2:]

    large = bytes(np.random.default_rng(0).integers(0, 4, 2_000_000).astype(np.uint8))
    return {
        "text's check sum.png": whole[:33] + chunk(b"tEXt", b"a\0b")[:-4] + b"\0\0\0\0" + whole[33:],
        "2 MB of text.png": beside(b"zTXt", b"parameters\0\0" + zlib.compress(b"prompt " * 300_000)),
        "2 MB of international text.png": beside(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(b"prompt " * 300_000)),
        "2 MB of profile.png": beside(b"iCCP", b"icc\0\0" + zlib.compress(large)),
        "profile.png": beside(b"iCCP", b"icc\0\0not zlib at all"),
        "exif.png": beside(b"eXIf", b"\0\x08\0\x02\x01\x12\0\x03"),
        "check sum of exif.png": whole[:33] + chunk(b"eXIf", b"II*\0")[:-4] + b"\0\0\0\0" + whole[33:],
        "exif.jpg": app1(b"Exif\0\0\0\x08\0\x02\x01\x12\0\x03"),
        "cut exif.jpg": app1(b"Exif\0\0II*\0\x08\0\0\0\x01\0"),
        "orientation as text.jpg": app1(
            b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x02\0\0\0" + b"6\0\0\0" + b"\0" * 4
        ),
        "xmp.jpg": app1(b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x='"),
    }


@pytest.mark.parametrize("name", broken_metadata())
def test_whole_pixels_beside_broken_metadata_are_read(name: str) -> None:
    data = broken_metadata()[name]
    plain = io.BytesIO()
    picture(size=(64, 48)).save(plain, "PNG" if name.endswith("png") else "JPEG")
    assert torch.equal(decode(data, 3), decode(plain.getvalue(), 3))
    assert examine(data, 3)[0].endswith("RGB")


def test_a_turn_survives_a_broken_text() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    picture().save(file, "PNG", exif=exif)
    whole = file.getvalue()
    assert decode(whole[:33] + chunk(b"tEXt", b"a\0b")[:-4] + b"\0\0\0\0" + whole[33:], 3).shape == (3, 20, 12)


def test_broken_pixels_are_still_refused() -> None:
    file = io.BytesIO()
    picture(size=(90, 90)).save(file, "PNG")
    data = bytearray(file.getvalue())
    data[data.index(b"IDAT") + 12] ^= 255
    for broken in (bytes(data), file.getvalue()[:-60]):
        with pytest.raises(ImageError, match="decoded"):
            decode(broken, 3)


@pytest.mark.parametrize("suffix", [".heic", ".heif"])
def test_pictures_of_phones(tmp_path: Path, suffix: str) -> None:
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(picture(size=(64, 48))).save(tmp_path / f"x{suffix}", quality=95)
    source = open_source(tmp_path)
    assert source.read(0).shape == (3, 48, 64) and source.read(0)[0, :, 48:].float().mean() > 200
    assert check(source).kinds == {"HEIC": 1}


def test_avif_and_others_by_pillow(tmp_path: Path) -> None:
    for suffix in ("avif", "tga", "jfif", "pnm"):
        picture(size=(64, 48)).save(tmp_path / f"x.{suffix}", **({"format": "JPEG"} if suffix == "jfif" else {}))
    source = open_source(tmp_path)
    assert len(source) == 4 and all(source.read(i).shape == (3, 48, 64) for i in range(4))


def test_a_folder_of_arrays(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.npy").write_bytes(npy(LEVELS))
    source = open_source(tmp_path)
    assert len(source) == 3 and source.read(2).unique().numel() == 4096
    save(tmp_path / "x.png")
    assert len(open_source(tmp_path)) == 1  # beside images they are masks or features


def test_lzw_needs_imagecodecs_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("imagecodecs")
    data = tiff(COLORS, photometric="rgb", compression="lzw")
    assert torch.equal(decode(data, 3), decode(tiff(COLORS, photometric="rgb"), 3))

    def refuse(*_: object, **__: object) -> None:
        raise ValueError("<COMPRESSION.LZW: 5> requires the 'imagecodecs' package")

    monkeypatch.setattr(tifffile.TiffPage, "asarray", refuse)
    with pytest.raises(ImageError, match="pip install imagecodecs"):
        decode(data, 3)


# ---- through the loader, the check and the evaluation ----


def folder(tmp_path: Path, count: int = 8) -> Path:
    for i in range(count):
        values = (LEVELS.astype(np.int64) + 7 * i).clip(0, 4095).astype(np.uint16)
        place = tmp_path / f"class{i % 2}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i}.png").write_bytes(png16(values))
    return tmp_path


def test_the_check_names_the_bits_in_use(tmp_path: Path) -> None:
    source = open_source(folder(tmp_path))
    text = "\n".join(describe(source, check(source)))
    assert "values       0 to 4095 in 8 images of more than 8 bits that state no range" in text
    assert "6.2% of the range 0 to 65535" in text and "--bit-depth 12" in text and "PNG 1 x uint16: 8" in text
    assert "--bit-depth 12" in pixel_note(source)
    source.pixel_range = (0, 4095)
    assert "warning" not in "\n".join(describe(source, check(source))) and pixel_note(source) == ""
    source.pixel_range = (0, 1023)
    assert "go beyond 0 to 1023 and are clipped" in "\n".join(describe(source, check(source)))


def test_the_check_finds_the_range_of_floats(tmp_path: Path) -> None:
    (tmp_path / "x.tif").write_bytes(tiff(np.array([[-1.5, 2.5]], dtype=np.float32)))
    source = open_source(tmp_path)
    report = check(source)
    assert len(report.bad) == 1 and "--pixel-range -1.5 2.5 spans" in "\n".join(describe(source, report))


@pytest.mark.parametrize("gpu", [None, torch.device("cpu")])
def test_crops_keep_the_levels(tmp_path: Path, gpu: torch.device | None) -> None:
    """`gpu` on the CPU stands for one: images of more than 8 bits are cropped by the workers all the same."""
    root = folder(tmp_path)
    save(root / "class0" / "eight.png", picture("L", size=(64, 64)))
    source = open_source(root)
    source.channels, source.pixel_range = 1, (0, 4095)
    off = {"jitter_p": 0.0, "blur_p": (0.0, 0.0, 0.0), "solarize_p": (0.0, 0.0, 0.0)}
    crops = MultiCrop(64, 32, 2, mean=(0.0,), std=(1.0,), **off)
    batch = next(iter(train_loader(source, crops, batch_size=9, seed=0, gpu=gpu)))
    assert batch.global_crops.unique().numel() > 5000 and 0.9 < batch.global_crops.max() <= 1
    images, _ = next(eval_batches(source, 32, (0.0,), (1.0,)))
    assert images.unique().numel() > 2000 and 0.9 < images.max() <= 1 and images.min() >= 0


def test_a_preview_shows_them(tmp_path: Path) -> None:
    source = open_source(folder(tmp_path))
    source.pixel_range = (0, 4095)
    sheet = draw([source.read(0)], MultiCrop(32, 16, 1), 0)
    assert np.asarray(sheet).std() > 20


def test_training_and_what_follows_of_many_bands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Five bands of 12 bits from the files to the exported weights and an evaluation of them."""
    from dino_fast.cli.main import main

    rng = np.random.default_rng(0)
    for i in range(12):
        place = tmp_path / "images" / f"class{i % 2}"
        place.mkdir(parents=True, exist_ok=True)
        values = rng.integers(0, 4096, (24, 24, 5)).astype(np.uint16)
        (place / f"{i}.tif").write_bytes(tiff(values, planarconfig="contig"))
    run = tmp_path / "run"
    tiny = "--arch vit_tiny --patch-size 8 --embed-dim 32 --depth 1 --num-heads 1 --global-size 16 --local-size 8"
    tiny += " --local-crops 1 --out-dim 16 --head-hidden-dim 16 --head-bottleneck-dim 8 --batch-size 4 --max-steps 1"
    more = ["--channels", "5", "--bit-depth", "12", "--data", str(tmp_path / "images"), "--out", str(run)]
    assert main(["train", *tiny.split(), "--epochs", "1", "--warmup-epochs", "0", *more]) == 0
    config = (run / "config.yaml").read_text()
    assert "bit_depth: 12" in config and "channels: 5" in config
    assert main(["eval", "knn", "--checkpoint", str(run), "--data", str(tmp_path / "images"), "--k", "2"]) == 0
    out = tmp_path / "hub"
    assert main(["export", "--checkpoint", str(run), "--out", str(out), "--format", "torch-hub"]) == 0
    assert "PIXEL_RANGE = [0.0, 4095.0]" in (out / "hubconf.py").read_text()
    from dino_fast.eval.common.backbone import open_backbone

    for exported in (run, out / "backbone.safetensors", run / "export" / "teacher.safetensors"):
        frozen = open_backbone(exported, device="cpu")
        assert frozen.backbone.in_chans == 5 and frozen.pixel_range == (0, 4095) and frozen.mean == (0.449,)
    capsys.readouterr()
