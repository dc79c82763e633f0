"""Pixels of more than 8 bits, signed ones, floats, and any number of bands: 16-bit PNG and PGM, TIFF, npy.

A file's samples become float32 from 0 to 255, the scale of 8-bit pixels, without rounding: black is the low end of the
range of values and white the high end. The range is, in this order, the one that was asked for, the one that the file
states, or all that its unsigned samples of up to 16 bits can hold. Signed samples, floats and integers of 32 bits have
no range of their own, and without one they are refused.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image, TiffImagePlugin
from torch import Tensor

from dino_fast.errors import UserError

Range = tuple[float, float]  # the values that become black and white
MAX_PIXELS = 89_478_485  # a quarter of a GiB of RGB; more is a decompression bomb (the limit at which Pillow warns)
MAX_CHANNELS = 16  # that multi_crop takes
PNG, NPY = b"\x89PNG\r\n\x1a\n", b"\x93NUMPY"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
# TIFF tags
_BITS, _PHOTOMETRIC, _ORIENTATION, _BANDS = 258, 262, 274, 277
_MIN, _MAX, _EXTRA, _FORMAT, _SMIN, _SMAX = 280, 281, 338, 339, 340, 341
_WHITE_IS_ZERO, _RGB = 0, 2
_BY_PILLOW = {(1, 16), (2, 16), (2, 32), (3, 32)}  # sample format and bits of one band that Pillow reads right
_TURNS: dict[int, tuple[bool, bool, bool]] = {  # EXIF orientation: transpose, flip rows, flip columns
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


class ImageError(UserError):
    """One image cannot be read: the reason, and once it has passed through a source, the image's name before it."""


class RangeError(ImageError):
    """An image whose samples have no known range; `low` and `high` are the values that it holds."""

    def __init__(self, text: str, low: float = 0.0, high: float = 0.0) -> None:
        super().__init__(text)
        self.low, self.high = low, high


class Samples(NamedTuple):
    """What a file holds, before it is scaled."""

    values: np.ndarray  # [H, W, C]
    stated: Range | None  # by the file
    kind: str  # for a report, such as "TIFF 7 x uint16"
    color: bool = False  # the first three are red, green and blue
    alpha: bool = False  # the last is opacity


def range_of(bit_depth: int | None, pixel_range: Range | None) -> Range | None:
    """The range that the settings `bit_depth` and `pixel_range` ask for, None where neither is given."""
    if bit_depth is not None:
        return 0.0, float((1 << bit_depth) - 1)
    return None if pixel_range is None else (float(pixel_range[0]), float(pixel_range[1]))


def read_samples(data: bytes, channels: int) -> Samples | None:
    """The samples of a file that is more than a picture of 8 bits and up to 3 channels; None for every other file.

    Raises ImageError with the reason, naming the package that is missing.
    """
    if data.startswith(NPY):
        return _npy(data, channels)
    if data.startswith(PNG) and data[24:25] == b"\x10":
        return _png(data)
    if data[:2] in (b"P5", b"P6"):
        return _netpbm(data)
    if data[:4] in TIFF:
        return _tiff(data, channels)
    return None


def to_pixels(samples: Samples, channels: int, asked: Range | None) -> Tensor:
    """[channels, H, W]: uint8 where the samples are, else float32 from 0 to 255.

    Values beyond the range are clipped, and NaN (no data) becomes black. Raises ImageError for channels that the file
    does not have, and RangeError where the range is not known.
    """
    values, (color, alpha) = samples.values, (samples.color, samples.alpha)
    if values.dtype == bool:
        values = values.astype(np.uint8) * np.uint8(255)
    if values.dtype != np.uint8:
        values = _scaled(values, asked or _known_range(samples))
    count = values.shape[2]
    if count != channels:
        values = _with_channels(values, channels, color, alpha)
    return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))


def extremes(values: np.ndarray) -> Range:
    """The least and the largest finite value; (0, 0) where there is none."""
    finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)


def _known_range(samples: Samples) -> Range:
    if samples.stated is not None:
        return samples.stated
    kind = samples.values.dtype
    if kind.kind == "u" and kind.itemsize <= 2:
        return 0.0, float(np.iinfo(kind).max)
    low, high = extremes(samples.values)
    raise RangeError(
        f"{kind} pixels from {low:g} to {high:g}, whose range the file does not state: give the values that are black "
        "and white, the same for all images, as --pixel-range LOW HIGH, or save it with 8 or 16 bits",
        low,
        high,
    )


def _scaled(values: np.ndarray, limits: Range) -> np.ndarray:
    low, high = limits
    exact = values.dtype.kind in "ub" and values.dtype.itemsize <= 2 and low == 0  # 65535 * 255 < 2^24
    scaled = values.astype(np.float32 if exact else np.float64)
    if low:
        scaled -= low
    scaled *= 255
    scaled /= high - low
    scaled = scaled.astype(np.float32, copy=False)
    np.clip(scaled, 0, 255, out=scaled)
    return np.nan_to_num(scaled, copy=False, nan=0.0)


def _with_channels(values: np.ndarray, channels: int, color: bool, alpha: bool) -> np.ndarray:
    count = values.shape[2]
    if channels < 4 and color and count > 3:
        values = values[..., :3]  # what comes after red, green and blue
    elif channels in (1, 3) and count == 2 and alpha:
        values = values[..., :1]
    if values.shape[2] == channels:
        return values
    if channels == 1 and color and values.shape[2] == 3:
        gray = values.astype(np.float32) @ _LUMA
        return cast(np.ndarray, (gray if values.dtype != np.uint8 else (gray + 0.5).astype(np.uint8))[..., None])
    if channels == 3 and values.shape[2] == 1:
        return values.repeat(3, axis=2)
    opaque = np.full_like(values[..., :1], 255)
    if channels in (2, 4) and values.shape[2] == 1:
        return np.concatenate([values] * (channels - 1) + [opaque], axis=2)
    if channels == 4 and color and values.shape[2] == 3:
        return np.concatenate((values, opaque), axis=2)
    hint = f"give --channels {count}" if count <= MAX_CHANNELS else f"up to {MAX_CHANNELS} are supported"
    raise ImageError(f"{count} channels, and {channels} are read; {hint}")


# ---- formats ----


def _npy(data: bytes, channels: int) -> Samples:
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except ValueError as error:
        raise ImageError(f"an .npy file that cannot be read ({error})") from error
    if array.dtype.kind not in "buif":
        raise ImageError(f"an .npy file of {array.dtype}; an image is of integers or floats")
    if array.ndim == 2:
        array = array[..., None]
    elif (
        array.ndim == 3
        and array.shape[2] != channels
        and (array.shape[0] == channels or (array.shape[2] > 4 >= array.shape[0]))
    ):
        array = array.transpose(1, 2, 0)  # [C, H, W]
    if array.ndim != 3 or 0 in array.shape:
        raise ImageError(f"an array of shape {list(array.shape)}; an image is [H, W], [H, W, C] or [C, H, W]")
    _check_size(array.shape[0], array.shape[1], array.shape[2])
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    count = array.shape[2]
    return Samples(array, None, f"npy {count} x {array.dtype}", color=count == 3)


def _png(data: bytes) -> Samples:
    """A PNG of 16 bits. Pillow keeps 16 of gray ones only."""
    width, height = struct.unpack(">II", data[16:24])
    _check_size(height, width)
    values = _png_pixels(without_metadata(data))  # libpng refuses some chunks that say nothing about pixels
    count = values.shape[2]
    bits = next((min(body) for name, body in png_chunks(data) if name == b"sBIT" and body), 16)
    kind = f"PNG {count} x uint16"
    return Samples(values, _significant(values, bits), kind, color=count > 2, alpha=count in (2, 4))


def _png_pixels(data: bytes) -> np.ndarray:
    """uint16 [H, W, C]."""
    try:
        from torchcodec.decoders import decode_png

        pixels = decode_png(data, mode="UNCHANGED", output_dtype=torch.uint16)
    except (ImportError, OSError):
        with Image.open(io.BytesIO(data)) as image:
            if not image.mode.startswith("I"):
                raise ImageError("a 16-bit PNG in color is read by torchcodec: pip install torchcodec") from None
            return np.asarray(image).astype(np.uint16)[..., None]
    except RuntimeError as error:
        raise ImageError(f"cannot be decoded ({str(error).splitlines()[0]})") from error
    values: np.ndarray = pixels.permute(1, 2, 0).numpy()
    return values


def _significant(values: np.ndarray, bits: int) -> Range | None:
    """The range of 16-bit samples of which the file says that `bits` are significant.

    By the standard they are scaled up to 16 bits; many writers leave them as they are, with zeros above.
    """
    if not 0 < bits < 16:
        return None
    high = (1 << bits) - 1
    scaled_up = values.max(initial=0) > high or bool(((values & ((1 << (16 - bits)) - 1)) == 0).all() and values.any())
    return None if scaled_up else (0.0, float(high))


def _netpbm(data: bytes) -> Samples | None:
    """Binary PGM and PPM of more than 8 bits, whose header has the range."""
    fields: list[int] = []
    at = 2
    while len(fields) < 3:
        while at < len(data) and (data[at : at + 1].isspace() or data[at : at + 1] == b"#"):
            at = data.find(b"\n", at) + 1 or len(data) if data[at : at + 1] == b"#" else at + 1
        end = at
        while data[end : end + 1].isdigit():
            end += 1
        if end == at:
            return None  # Pillow says what is wrong
        fields.append(int(data[at:end]))
        at = end
    width, height, most = fields
    if not 255 < most < 65536:
        return None
    count = 3 if data[1:2] == b"6" else 1
    _check_size(height, width, count)
    if len(data) - at - 1 < 2 * height * width * count:
        raise ImageError("cannot be decoded (the file is cut off)")
    values = np.frombuffer(data, ">u2", height * width * count, at + 1).astype(np.uint16)
    kind = f"{'PPM' if count == 3 else 'PGM'} {count} x uint16"
    return Samples(values.reshape(height, width, count), (0.0, float(most)), kind, color=count == 3)


def _tiff(data: bytes, channels: int) -> Samples | None:
    try:
        tags = _tiff_tags(data)
        bits, bands = max(_numbers(tags, _BITS) or [1]), int(tags.get(_BANDS, 1))
        form, photometric = (_numbers(tags, _FORMAT) or [1])[0], tags.get(_PHOTOMETRIC, 1)
        height, width = int(tags[257]), int(tags[256])
    except Exception:  # Pillow raises anything on broken files, and says so once more when it opens the image
        return None
    if bits <= 8 and form == 1 and (bands <= 2 or photometric != 1) and channels in (1, 3):
        return None  # what Pillow reads, or refuses with a reason
    if bits <= 8 and form == 1 and max(bands, channels) <= 4 and _pillow_bands(data) == bands:
        return None
    _check_size(height, width, bands)
    if bands == 1 and (form, bits) in _BY_PILLOW and channels in (1, 3):
        values = _tiff_by_pillow(data)  # upright
    else:
        values = _turned(_tiff_by_tifffile(data, channels), int(tags.get(_ORIENTATION, 1)))
    extra = _numbers(tags, _EXTRA)
    bands = values.shape[2]
    color = photometric == _RGB and bands >= 3
    stated = _stated_range(tags, values.dtype, bits)
    if photometric == _WHITE_IS_ZERO and bands == 1:
        stated = _inverted(stated, values.dtype)
    alpha = bands == (4 if color else 2) and bool(extra) and extra[-1] in (1, 2)
    return Samples(values, stated, f"TIFF {bands} x {values.dtype}", color, alpha)


def _tiff_tags(data: bytes) -> dict[int, Any]:
    header = data[:16] if data[2:4] in (b"+\0", b"\0+") else data[:8]
    tags = TiffImagePlugin.ImageFileDirectory_v2(header)
    file = io.BytesIO(data)
    file.seek(tags.next)
    tags.load(file)
    return {tag: tags[tag] for tag in (256, 257, *range(_BITS, _BITS + 1), _PHOTOMETRIC, _ORIENTATION, _BANDS,
            _MIN, _MAX, _EXTRA, _FORMAT, _SMIN, _SMAX) if tag in tags}  # fmt: skip


def _numbers(tags: dict[int, Any], tag: int) -> list[Any]:
    value = tags.get(tag, ())
    return list(value) if isinstance(value, tuple | list) else [value]


def _stated_range(tags: dict[int, Any], dtype: np.dtype[Any], bits: int) -> Range | None:
    for low_tag, high_tag in ((_SMIN, _SMAX), (_MIN, _MAX)):
        low, high = _numbers(tags, low_tag), _numbers(tags, high_tag)
        if high and float(max(high)) > (bottom := float(min(low)) if low else 0.0):
            return bottom, float(max(high))
    return (0.0, float((1 << bits) - 1)) if dtype.kind == "u" and 8 < bits < 16 else None


def _inverted(stated: Range | None, dtype: np.dtype[Any]) -> Range | None:
    if stated is None and dtype.kind == "u" and dtype.itemsize <= 2:
        stated = 0.0, float(np.iinfo(dtype).max)
    return None if stated is None else (stated[1], stated[0])


def _pillow_bands(data: bytes) -> int:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return len(image.getbands())
    except Exception:
        return 0


def _tiff_by_pillow(data: bytes) -> np.ndarray:
    """One band of uint16, int16, int32 or float32: [H, W, 1]."""
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        values = np.asarray(image)
        narrow = image.mode == "I" and (image.tag_v2.get(_BITS) or (32,))[0] == 16  # type: ignore[attr-defined]
    values = values.astype(np.int16 if narrow else values.dtype.newbyteorder("="))
    return values[..., None]


def _tiff_by_tifffile(data: bytes, channels: int) -> np.ndarray:
    """The first page as [H, W, C]; as many pages of one band as there are channels make one image."""
    try:
        import tifffile
    except ImportError as error:
        raise ImageError("such bands or numbers of a TIFF are read by tifffile: pip install tifffile") from error
    try:
        with warnings.catch_warnings(), tifffile.TiffFile(io.BytesIO(data)) as file:
            page = file.pages[0]
            stacked = page.samplesperpixel == 1 and channels not in (1, 3) and len(file.pages) == channels
            array = np.stack([p.asarray() for p in file.pages], axis=-1) if stacked else page.asarray()
            if not stacked and page.samplesperpixel > 1 and page.axes.startswith("S"):
                array = np.moveaxis(array, 0, -1)  # each band in a plane of its own
    except ImageError:
        raise
    except Exception as error:  # tifffile raises anything on broken files
        missing = ": pip install imagecodecs" if "imagecodecs" in str(error) else ""
        raise ImageError(f"cannot be decoded ({str(error) or type(error).__name__}{missing})") from error
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3:
        raise ImageError(f"a TIFF of shape {list(array.shape)}; an image is [H, W] or [H, W, C]")
    return cast(np.ndarray, array.astype(array.dtype.newbyteorder("="), copy=False))


def _turned(values: np.ndarray, orientation: int) -> np.ndarray:
    transpose, rows, columns = _TURNS.get(orientation, (False, False, False))
    if transpose:
        values = values.transpose(1, 0, 2)
    return values[:: -1 if rows else 1, :: -1 if columns else 1]


def _check_size(height: int, width: int, bands: int = 1) -> None:
    """Raises ImageError for more pixels, or values, than a picture has."""
    if height * width > MAX_PIXELS or height * width * bands > MAX_CHANNELS * MAX_PIXELS:
        raise ImageError(
            f"{width} x {height} pixels{f' of {bands} bands' if bands > 4 else ''}; more than {MAX_PIXELS:,} are "
            "refused as a decompression bomb. Scale the image down first"
        )


# ---- metadata ----

_PIXELS = {b"IHDR", b"PLTE", b"tRNS", b"sBIT", b"IDAT", b"IEND"}  # chunks of a PNG without which it looks different


def png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Names and contents of the chunks of a PNG, as far as they are whole."""
    for name, start, end in _chunk_places(data):
        yield name, data[start + 8 : end - 4]


def _chunk_places(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    at = len(PNG)
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if end > len(data):
            return
        yield data[at + 4 : at + 8], at, end
        at = end


def without_metadata(data: bytes, exif: bool = False) -> bytes:
    """A PNG or JPEG file with what makes its pixels alone, and its EXIF data if asked for; other files as they are."""
    if data.startswith(PNG):
        places = list(_chunk_places(data))
        rest = data[places[-1][2] :] if places else data[len(PNG) :]  # of a file that is cut off
        kept = {*_PIXELS, b"eXIf"} if exif else _PIXELS
        return PNG + b"".join(data[start:end] for name, start, end in places if name in kept) + rest
    if data.startswith(b"\xff\xd8"):
        return _jpeg_without_metadata(data, exif)
    return data


def _jpeg_without_metadata(data: bytes, exif: bool) -> bytes:
    """Without APP1 to APP13, APP15 and comments; APP0 (JFIF) and APP14 (Adobe) say how colors are stored."""
    parts, at = [data[:2]], 2
    while data[at : at + 1] == b"\xff" and at + 4 <= len(data):
        marker = data[at + 1]
        if marker == 0xFF:  # fill
            at += 1
            continue
        if marker == 0xDA or 0xD0 <= marker <= 0xD9:  # the pixels
            break
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        keep = exif and marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0"
        if keep or not (marker == 0xFE or (0xE0 < marker <= 0xEF and marker != 0xEE)):
            parts.append(data[at:end])
        at = end
    return b"".join((*parts, data[at:]))
