"""Bytes of an image file -> [C, H, W], whatever the format, or an ImageError that says what is wrong with it.

Pixels are uint8, or float32 from 0 to 255 where the file has more than 8 bits (deep_pixels.py).

Pillow opens every file of 8 bits: it knows every format people have, says what is wrong, and finds the extent before
any memory is asked for. The pixels of an ordinary JPEG then come from jpeg.py, which hands libjpeg-turbo's rows on
without Pillow's copies (half the time, the same bits); what it refuses (CMYK, truncation) Pillow decides about.

JPEGs are decoded at full size, never at a half or an eighth: libjpeg scales in its transform, and crops made from that
lie within 2/255 of the full ones at 89 % of their values where 99.9 % are asked for (photographs to 96 pixels).
"""

from __future__ import annotations

import contextlib
import functools
import io
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from dino_fast.data.deep_pixels import (
    MAX_CHANNELS,
    MAX_PIXELS,
    ImageError,
    Range,
    RangeError,
    extremes,
    read_samples,
    to_pixels,
    without_metadata,
)
from dino_fast.data.jpeg import decode_jpegs

__all__ = ["ImageError", "Jpeg", "RangeError", "decode", "examine", "ignore_pillow_warnings", "jpeg_or_pixels"]

_ORIENTATION = 0x0112  # the EXIF tag
_AS_IS = {1: ("L",), 3: ("L", "RGB")}  # modes that libjpeg turns into 1 or 3 channels with Pillow's bits
_EXIF = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}  # where Pillow keeps it
_HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}  # brands of files that Pillow lacks


def ignore_pillow_warnings() -> None:
    """Lets Pillow's plugins warn of nothing: a broken file is an ImageError, and what it reads all the same is used.

    One filter for the process, set here and again before workers and threads start, since an import inside
    `warnings.catch_warnings` loses it. (`catch_warnings` around each image would not do: it swaps the process's
    filters, so that threads lose each other's warnings and leave filters behind.)
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")


ignore_pillow_warnings()


class Jpeg(NamedTuple):
    """An ordinary JPEG file that is yet to be decoded."""

    data: bytes
    height: int
    width: int


def decode(data: bytes, channels: int, pixel_range: Range | None = None) -> Tensor:
    """Decodes the first frame to [channels, H, W] (1 is gray, 3 is RGB), upright as its EXIF tag says.

    uint8; float32 from 0 to 255 where the file has more than 8 bits, whose values `pixel_range` become 0 and 255
    (default: the range that the file states, or all of 16 unsigned bits). For 1 and 3 channels transparency is
    dropped, as the original does; 2 are gray and opacity, 4 are RGB and opacity or the file's own four. Pixels that are
    whole are read whatever the metadata beside them is. Raises ImageError with the reason.
    """
    if not data:
        raise ImageError("the file is empty (0 bytes)")
    if not 1 <= channels <= MAX_CHANNELS:
        raise ImageError(f"{channels} channels; 1 to {MAX_CHANNELS} are supported")
    try:
        return _decode(data, channels, pixel_range)
    except RangeError:
        raise
    except ImageError as error:
        for exif in (True, False):
            plain = without_metadata(data, exif)
            if plain != data:
                with contextlib.suppress(ImageError):
                    return _decode(plain, channels, pixel_range)
        raise error


def _decode(data: bytes, channels: int, pixel_range: Range | None) -> Tensor:
    try:
        samples = read_samples(data, channels)
        if samples is not None:
            return to_pixels(samples, channels, pixel_range)
        if data[4:8] == b"ftyp" and data[8:12] in _HEIC:
            return _heic(data, channels)
        with Image.open(io.BytesIO(data)) as image:
            return _to_tensor(image, data, channels)
    except ImageError:
        raise
    except Image.UnidentifiedImageError:
        raise ImageError(f"not an image in a known format (it starts with {data[:12]!r})") from None
    except Exception as error:  # Pillow's plugins raise anything at all on broken files
        raise ImageError(f"cannot be decoded ({error or type(error).__name__})") from error


def examine(data: bytes, channels: int) -> tuple[str, Range | None]:
    """A file's kind, such as `JPEG RGB`, and the range of its samples.

    The range is the least and largest of them where they have more than 8 bits and the file does not state it, else
    None. Raises ImageError for a file that cannot be read.
    """
    samples = read_samples(data, channels)
    if samples is not None:
        unstated = samples.stated is None and samples.values.dtype not in (np.uint8, np.bool_)
        return samples.kind, extremes(samples.values) if unstated else None
    if data[4:8] == b"ftyp" and data[8:12] in _HEIC:
        return "HEIC", None
    for exif in (True, False):
        with contextlib.suppress(Exception), Image.open(io.BytesIO(data)) as image:
            return f"{image.format} {image.mode}", None
        data = without_metadata(data, exif)
    try:
        with Image.open(io.BytesIO(data)) as image:
            return f"{image.format} {image.mode}", None
    except Exception as error:  # Pillow's formats raise what they like
        raise ImageError(f"no image that can be read ({type(error).__name__}: {error})") from error


def jpeg_or_pixels(data: bytes, channels: int, pixel_range: Range | None = None) -> Jpeg | Tensor:
    """The file itself where it is an ordinary, whole JPEG, else its pixels by `decode`.

    Any decoder reads such a JPEG alike but for rounding.
    """
    if data[:2] == b"\xff\xd8" and data.rstrip(b"\0")[-2:] == b"\xff\xd9":
        with contextlib.suppress(Exception), Image.open(io.BytesIO(data)) as image:  # decode says what is wrong
            if _is_ordinary(image, channels) and image.width * image.height <= MAX_PIXELS:
                return Jpeg(data, image.height, image.width)
    return decode(data, channels, pixel_range)


def _is_ordinary(image: Image.Image, channels: int) -> bool:
    return image.format in ("JPEG", "MPO") and image.mode in _AS_IS.get(channels, ()) and not _turned(image)


def _to_tensor(image: Image.Image, data: bytes, channels: int) -> Tensor:
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(
            f"{image.width} x {image.height} pixels; more than {MAX_PIXELS:,} are refused "
            "as a decompression bomb. Scale the image down first"
        )
    if _is_ordinary(image, channels):
        decoded = _jpeg(data, image, channels)
        if decoded is not None:
            return decoded
    image.load()  # finds truncation, and the EXIF data that PNG may hold at its end
    if _turned(image):
        image = ImageOps.exif_transpose(image)
    return _planes(_bands(_eight_bits(image), channels))


def _bands(image: Image.Image, channels: int) -> Image.Image:
    """The picture with so many bands."""
    if len(image.getbands()) == channels and image.mode not in ("P", "1", "YCbCr", "HSV", "LAB"):
        return image
    mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}.get(channels)
    if mode is None:
        count = len(image.getbands())
        raise ImageError(f"{count} channels ({image.mode}), and {channels} are read; give --channels {count}")
    if mode == "LA" and image.mode not in ("L", "1"):
        image = image.convert("RGBA")
    return image.convert(mode)


def _planes(image: Image.Image) -> Tensor:
    pixels = np.array(image)  # writable, so a copy
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy() if pixels.ndim == 3 else pixels[None])


def _turned(image: Image.Image) -> bool:
    """Whether EXIF or XMP says that the picture is not stored upright; what cannot be understood says nothing."""
    if image.format != "TIFF" and not _EXIF & image.info.keys():
        return False
    try:
        return image.getexif().get(_ORIENTATION, 1) in range(2, 9)
    except Exception:
        return False


def _jpeg(data: bytes, image: Image.Image, channels: int) -> Tensor | None:
    """uint8 [channels, H, W] by libjpeg-turbo, None where it refuses the file or is not here."""
    try:
        file = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        pixels = decode_jpegs([file], channels, torch.device("cpu"))[0]
    except (ImportError, RuntimeError):
        return None
    return pixels if pixels.shape == (channels, image.height, image.width) else None


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # JPEG 2000
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ImageError("32-bit pixels have no known range; save it with 8 or 16 bits")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA")
    return image


# ---- HEIC ----


def _heic(data: bytes, channels: int) -> Tensor:
    """By pillow-heif, or by torchcodec where libheif is on the machine."""
    if _pillow_reads_heic():
        with Image.open(io.BytesIO(data)) as image:
            return _to_tensor(image, data, channels)
    try:
        from torchcodec.decoders import decode_heic

        mode: Any = {1: "GRAY", 2: "GRAY_ALPHA", 4: "RGB_ALPHA"}.get(channels, "RGB")
        pixels = decode_heic(data, mode=mode)
    except (ImportError, OSError, RuntimeError) as error:
        raise ImageError("a HEIC file, as of a phone, is read by pillow-heif: pip install pillow-heif") from error
    return (pixels[0] if pixels.dim() == 4 else pixels).contiguous()


@functools.cache
def _pillow_reads_heic() -> bool:
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True
