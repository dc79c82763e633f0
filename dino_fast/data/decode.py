"""Bytes of an image file -> uint8 [C, H, W], whatever the format, or an ImageError that says what is wrong with it.

Pillow, not torchvision.io: it reads every format people have, where torchvision refuses BMP and TIFF and changes CMYK's
colours; it reports truncation; and on JPEG both call libjpeg-turbo.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from dino_fast.errors import UserError

MAX_PIXELS = 89_478_485  # a quarter of a GiB of RGB; more is a decompression bomb (the limit at which Pillow warns)
_ORIENTATION = 0x0112  # the EXIF tag
_EXIF = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}  # where Pillow keeps it


class ImageError(UserError):
    """One image cannot be read: the reason, and once it has passed through a source, the image's name before it."""


def decode(data: bytes, channels: int) -> Tensor:
    """Decodes the first frame to uint8 [channels, H, W] (1 is grey, 3 is RGB), upright as its EXIF tag says.

    Alpha is dropped, as the original does; 16-bit grey keeps its high byte. Raises ImageError with the reason.
    """
    if not data:
        raise ImageError("the file is empty (0 bytes)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                return _to_tensor(image, channels)
    except ImageError:
        raise
    except Image.UnidentifiedImageError:
        raise ImageError(f"not an image in a known format (it starts with {data[:12]!r})") from None
    except Exception as error:  # Pillow's plugins raise anything at all on broken files
        raise ImageError(f"cannot be decoded ({error or type(error).__name__})") from error


def _to_tensor(image: Image.Image, channels: int) -> Tensor:
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(
            f"{image.width} x {image.height} pixels; more than {MAX_PIXELS:,} are refused "
            "as a decompression bomb. Scale the image down first"
        )
    image.load()  # finds truncation, and the EXIF data that PNG may hold at its end
    if (image.format == "TIFF" or _EXIF & image.info.keys()) and image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    pixels = np.array(_eight_bits(image).convert("RGB" if channels == 3 else "L"))  # writable, so a copy
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy() if channels == 3 else pixels[None])


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
