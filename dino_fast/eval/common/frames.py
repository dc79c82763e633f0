"""Plain images, sequences of frames and video files, in and out.

Video files are read and written with PyAV, which brings its own ffmpeg and is no dependency: a folder of frames needs
nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dino_fast.data import ImageError
from dino_fast.data.decode import decode
from dino_fast.data.deep_pixels import Range
from dino_fast.data.source import EXTENSIONS
from dino_fast.errors import UserError, unwritable
from dino_fast.ops.multi_crop import from_pillow, to_pillow

VIDEOS = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg"}


def list_images(path: str | Path) -> list[Path]:
    """The image at `path`, or all images in the folder and its sub-folders in order of name, hidden ones left out."""
    path = Path(path).expanduser()
    if path.is_file():
        if path.suffix.lower() not in EXTENSIONS:
            raise UserError(f"{path} is no image by its name; accepted: {', '.join(sorted(EXTENSIONS))}")
        return [path]
    if not path.is_dir():
        raise UserError(f"{path} does not exist; give an image or a folder of images")
    images = [p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file()]
    images = sorted(p for p in images if not any(part.startswith(".") for part in p.relative_to(path).parts))
    if not images:
        raise UserError(f"{path} holds no images (looked in all sub-folders for {', '.join(sorted(EXTENSIONS))})")
    return images


def read_image(path: Path, channels: int = 3, pixel_range: Range | None = None) -> Tensor:
    """`[channels, H, W]`, see `dino_fast.data.decode.decode`. Raises ImageError naming the file."""
    try:
        return decode(path.read_bytes(), channels, pixel_range)
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror or error}") from error
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """uint8 `[C, H, W]` -> uint8 `[C, height, width]`, bicubic with antialiasing."""
    if image.shape[1:] == (height, width):
        return image
    return from_pillow([plane.resize((width, height), Image.Resampling.BICUBIC) for plane in to_pillow(image)])


def fit_to_patches(image: Tensor, side: int, patch: int) -> Tensor:
    """uint8 `[C, H, W]` -> its shorter side about `side` pixels, both sides whole multiples of `patch`, nothing cut."""
    if side < patch:
        raise UserError(f"the image size {side} is smaller than one patch of {patch}; try --image-size {10 * patch}")
    scale = side / min(image.shape[1:])
    height, width = (max(1, round(length * scale / patch)) * patch for length in image.shape[1:])
    return resize(image, height, width)


def read_video(path: Path, channels: int = 3) -> Iterator[Tensor]:
    """The frames of a video file as a player shows them, uint8 `[channels, H, W]`: upright, without what was trimmed.

    Raises UserError before the first frame where the file has fewer than it says.
    """
    av = _av(f"reading {path}")
    expected, count = _whole_frames(path, av), 0
    try:
        with av.open(str(path)) as file:
            for frame in file.decode(file.streams.video[0]):
                pixels = frame.to_ndarray(format="rgb24" if channels == 3 else "gray")
                pixels = np.rot90(pixels, round(frame.rotation / 90))  # both count counterclockwise
                count += 1
                yield torch.from_numpy(pixels.transpose(2, 0, 1).copy() if channels == 3 else pixels[None].copy())
    except (av.error.FFmpegError, OSError) as error:
        after = f" after {count} frames" if count else ""
        raise UserError(f"{path} cannot be read{after}: {error}. Is it cut off?") from error
    if count < expected or not count:
        raise UserError(f"{path} ends early: {count} of {expected} frames are there. Copy or download it again")


def frame_rate(path: Path) -> float | None:
    """Frames a second of a video file, or None where it does not say."""
    av = _av(f"reading {path}")
    try:
        with av.open(str(path)) as file:
            rates = [stream.average_rate or stream.guessed_rate for stream in file.streams.video]
    except (av.error.FFmpegError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}. Is it a video?") from error
    return float(rates[0]) if rates and rates[0] else None


def _whole_frames(path: Path, av: ModuleType) -> int:
    """The number of frames that the file says it shows, or 0; from its packets, none of which is decoded.

    A file that was trimmed without being encoded again keeps packets that are not shown. Raises UserError where packets
    are missing or damaged.
    """
    packets = damaged = hidden = 0
    try:
        with av.open(str(path)) as file:
            if not file.streams.video:
                raise UserError(f"{path} has no pictures, only {len(file.streams)} other streams")
            stream = file.streams.video[0]
            stated = stream.frames  # 0 where the format does not say
            for packet in file.demux(stream):
                if packet.size:
                    packets += 1
                    damaged += packet.is_corrupt
                    hidden += packet.is_discard
    except (av.error.FFmpegError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}. Is it cut off?") from error
    whole = packets - damaged
    if whole < stated or not whole:
        raise UserError(f"{path} ends early: {whole} of {stated} frames are there. Copy or download it again")
    return max(0, int(stated) - hidden)


def can_write_video() -> str:
    """Empty, or the command that installs the missing package."""
    try:
        import av  # noqa: F401
    except ImportError:
        return "pip install av"
    return ""


def write_video(path: Path, frames: Iterable[np.ndarray], fps: float) -> int:
    """Writes uint8 `[H, W, 3]` frames of one size as H.264 and returns their number.

    An odd side loses its last row or column, which the format cannot hold. Raises UserError if the file cannot be
    written or PyAV is missing.
    """
    from fractions import Fraction

    av = _av(f"writing {path}")
    count = 0
    try:
        with av.open(str(path), mode="w") as file:
            stream = file.add_stream("h264", rate=Fraction(fps).limit_denominator(1001))
            stream.pix_fmt = "yuv420p"
            for pixels in frames:
                even = np.ascontiguousarray(pixels[: pixels.shape[0] // 2 * 2, : pixels.shape[1] // 2 * 2])
                if not count:
                    stream.height, stream.width = even.shape[:2]
                file.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))
                count += 1
            file.mux(stream.encode())
    except (av.error.FFmpegError, OSError) as error:
        raise unwritable(path, error) from error
    return count


def _av(purpose: str) -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise UserError(f"{purpose} needs the package av (pip install av); a folder of frames needs nothing") from error
    return av
