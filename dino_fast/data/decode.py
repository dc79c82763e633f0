"""Bytes of an image file -> uint8 [C, H, W], whatever the format, or an ImageError that says what is wrong with it.

Pillow opens every file: it knows every format people have, says what is wrong, and finds the extent before any memory
is asked for. The pixels of an ordinary JPEG then come from jpeg.py, which hands libjpeg-turbo's rows on without
Pillow's copies (half the time, the same bits); what it refuses (CMYK, truncation) Pillow decides about.

JPEGs are decoded at full size, never at a half or an eighth: libjpeg scales in its transform, and crops made from that
lie within 2/255 of the full ones at 89 % of their values where 99.9 % are asked for (photographs to 96 pixels).
"""

from __future__ import annotations

import contextlib
import io
import warnings
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from dino_fast.data.jpeg import decode_jpegs
from dino_fast.errors import UserError

MAX_PIXELS = 89_478_485  # a quarter of a GiB of RGB; more is a decompression bomb (the limit at which Pillow warns)
_ORIENTATION = 0x0112  # the EXIF tag
_AS_IS = {1: ("L",), 3: ("L", "RGB")}  # modes that libjpeg turns into 1 or 3 channels with Pillow's bits
_EXIF = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}  # where Pillow keeps it


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


class ImageError(UserError):
    """One image cannot be read: the reason, and once it has passed through a source, the image's name before it."""


def decode(data: bytes, channels: int) -> Tensor:
    """Decodes the first frame to uint8 [channels, H, W] (1 is grey, 3 is RGB), upright as its EXIF tag says.

    Alpha is dropped, as the original does; 16-bit grey keeps its high byte. Raises ImageError with the reason.
    """
    if not data:
        raise ImageError("the file is empty (0 bytes)")
    try:
        with Image.open(io.BytesIO(data)) as image:
            return _to_tensor(image, data, channels)
    except ImageError:
        raise
    except Image.UnidentifiedImageError:
        raise ImageError(f"not an image in a known format (it starts with {data[:12]!r})") from None
    except Exception as error:  # Pillow's plugins raise anything at all on broken files
        raise ImageError(f"cannot be decoded ({error or type(error).__name__})") from error


def jpeg_or_pixels(data: bytes, channels: int) -> Jpeg | Tensor:
    """The file itself where it is an ordinary, whole JPEG, which any decoder reads alike but for rounding; else what
    `decode` makes of it."""
    if data[:2] == b"\xff\xd8" and data.rstrip(b"\0")[-2:] == b"\xff\xd9":
        with contextlib.suppress(Exception), Image.open(io.BytesIO(data)) as image:  # decode says what is wrong
            if _is_ordinary(image, channels) and image.width * image.height <= MAX_PIXELS:
                return Jpeg(data, image.height, image.width)
    return decode(data, channels)


def _is_ordinary(image: Image.Image, channels: int) -> bool:
    return image.format in ("JPEG", "MPO") and image.mode in _AS_IS[channels] and not _turned(image)


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
    pixels = np.array(_eight_bits(image).convert("RGB" if channels == 3 else "L"))  # writable, so a copy
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy() if channels == 3 else pixels[None])


def _turned(image: Image.Image) -> bool:
    """Whether EXIF or XMP says that the picture is not stored upright."""
    return bool((image.format == "TIFF" or _EXIF & image.info.keys()) and image.getexif().get(_ORIENTATION, 1) != 1)


def _jpeg(data: bytes, image: Image.Image, channels: int) -> Tensor | None:
    """uint8 [channels, H, W] by libjpeg-turbo, None where it refuses the file or is not here."""
    try:
        file = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        pixels = decode_jpegs([file], channels, torch.device("cpu"))[0]
    except (ImportError, RuntimeError):
        return None
    return pixels if pixels.shape == (channels, image.height, image.width) else None


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (
        image.mode == "I" and image.format == "PNG"
    ):  # older Pillow: 16-bit PNG is "I"
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ImageError("32-bit pixels have no known range; save it with 8 or 16 bits")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA")
    return image
