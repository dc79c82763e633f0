"""Numbered sets of images: the base of every source, images in memory, and a part of another source.

A source that is broken as a whole raises UserError when it is opened; one broken image raises ImageError when it is
read.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from dino_fast.data import jpeg
from dino_fast.data.decode import ImageError, Jpeg, decode, ignore_pillow_warnings, jpeg_or_pixels
from dino_fast.data.deep_pixels import Range
from dino_fast.errors import UserError

T = TypeVar("T")
EXTENSIONS = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pnm"),
    *(".jp2", ".avif", ".heic", ".heif", ".tga"),
}
_LFS = b"version https://git-lfs.github.com/spec/"
_LFS_MESSAGE = "a Git LFS pointer, not the file itself; run 'git lfs pull' in its repository"
TRAIN_DIRS, TEST_DIRS = ("train", "training"), ("val", "valid", "validation", "test", "testing")


class SourceNote(UserWarning):
    """What was taken for the images and what was left out, where a person might expect otherwise."""


class Source:
    """A numbered set of images, some with labels.

    `channels` is what `read` converts to: 3 unless the images are known to be gray; set it to choose. `pixel_range`
    are the values that become black and white in files of more than 8 bits, None for what each file says.
    `labels` is int64 [len] with -1 where there is none, or None where no image has one.
    """

    channels: int = 3
    pixel_range: Range | None = None
    classes: list[str] | None = None
    labels: np.ndarray | None = None
    unused_labels: str = ""  # why labels that are there are not used
    notes: Sequence[str] = ()  # what was taken for the images and what was left out, a sentence each
    test: Source | None = None  # the held-out part that came with it

    def __len__(self) -> int:
        raise TypeError(f"{type(self).__name__} does not say how many images it has")

    def name(self, index: int) -> str:
        """What to call the image in a message: its path, or file and row."""
        raise TypeError(f"{type(self).__name__} does not name its images")

    def read(self, index: int) -> Tensor:
        """[channels, H, W]: uint8, or float32 from 0 to 255 where the file has more than 8 bits.

        Raises ImageError naming the image.
        """
        return self._decoded(index, decode)

    def jpeg_or_pixels(self, index: int) -> Jpeg | Tensor:
        """The file of an ordinary JPEG, for a GPU to decode; else what `read` returns."""
        return self._decoded(index, jpeg_or_pixels)

    def _decoded(self, index: int, how: Callable[[bytes, int, Range | None], T]) -> T:
        data = self.data(index)
        try:
            return how(data, self.channels, self.pixel_range)
        except ImageError as error:
            reason = _LFS_MESSAGE if data.startswith(_LFS) else error
            error.args = (f"{self.name(index)}: {reason}",)  # of the same class: a RangeError has values
            raise

    def data(self, index: int) -> bytes:
        """The encoded file. Raises ImageError naming the image."""
        raise TypeError(f"{type(self).__name__} has no encoded images")

    def all_notes(self) -> list[str]:
        """The notes of both parts, and why labels that are there are not used."""
        parts = [part for part in (self, self.test) if part is not None]
        notes = [note for part in parts for note in (*part.notes, part.unused_labels) if note]
        return list(dict.fromkeys(notes))

    def prepare(self) -> None:
        """Prepares the process, once, before workers and threads start.

        Imports the decoders, and sets the warning filters, which are the process's.
        """
        ignore_pillow_warnings()
        jpeg.decoder()

    def label(self, index: int) -> int | None:
        """The class number of an image, or None where it has no label."""
        if self.labels is None or self.labels[index] < 0:
            return None
        return int(self.labels[index])


class ArraySource(Source):
    """Decoded images in memory: uint8 [N, C, H, W] with C = 1 or 3, and optional labels."""

    def __init__(
        self,
        images: Tensor,
        labels: Sequence[int] | np.ndarray | None = None,
        classes: list[str] | None = None,
        name: str = "array",
    ) -> None:
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
            raise UserError(f"images in memory are uint8 [N, 1 or 3, H, W], not {images.dtype} {list(images.shape)}")
        self.images, self.channels, self.classes, self._name = images, images.shape[1], classes, name
        self.labels = None if labels is None else np.asarray(labels, dtype=np.int64)
        if self.labels is not None and len(self.labels) != len(images):
            raise UserError(f"{len(images)} images with {len(self.labels)} labels; give one for each")

    def __len__(self) -> int:
        return len(self.images)

    @override
    def name(self, index: int) -> str:
        return f"{self._name}, image {index}"

    def prepare(self) -> None:
        """Nothing: the images are decoded."""

    @override
    def jpeg_or_pixels(self, index: int) -> Jpeg | Tensor:
        return self.read(index)

    @override
    def read(self, index: int) -> Tensor:
        image = self.images[index]
        if self.channels == len(image):
            return image
        if self.channels not in (1, 3):
            count = len(image)
            raise ImageError(
                f"{self.name(index)}: {count} channels, and {self.channels} are read; give --channels {count}"
            )
        if self.channels == 3:
            return image.expand(3, -1, -1)
        luma = torch.tensor([19595, 38470, 7471], dtype=torch.int32, device="cpu").view(
            3, 1, 1
        )  # Pillow's weights, times 65536
        return ((image.int() * luma).sum(0, keepdim=True) + 0x8000 >> 16).to(torch.uint8)


class Subset(Source):
    """Some images of another source, by index."""

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self.source, self.indices, self.classes = source, indices, source.classes
        self.unused_labels, self.notes = source.unused_labels, source.notes
        self.labels = None if source.labels is None else source.labels[indices]

    @property
    @override
    def channels(self) -> int:  # type: ignore[override]
        return self.source.channels

    @channels.setter
    def channels(self, value: int) -> None:
        self.source.channels = value

    @property
    @override
    def pixel_range(self) -> Range | None:  # type: ignore[override]
        return self.source.pixel_range

    @pixel_range.setter
    def pixel_range(self, value: Range | None) -> None:
        self.source.pixel_range = value

    def __len__(self) -> int:
        return len(self.indices)

    @override
    def prepare(self) -> None:
        self.source.prepare()

    @override
    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))

    @override
    def read(self, index: int) -> Tensor:
        return self.source.read(int(self.indices[index]))

    @override
    def jpeg_or_pixels(self, index: int) -> Jpeg | Tensor:
        return self.source.jpeg_or_pixels(int(self.indices[index]))

    @override
    def data(self, index: int) -> bytes:
        return self.source.data(int(self.indices[index]))


def configure(source: Source, channels: int | None, pixel_range: Range | None) -> None:
    """Sets how the images of a source, and of the part that came with it, are read; None leaves the channels."""
    for part in (source, source.test):
        if part is not None:
            part.channels = channels or part.channels
            part.pixel_range = pixel_range


def read_file(path: str | Path) -> bytes:
    """The file's bytes. Raises OSError, also for a FIFO, a socket or a device, which might never give any."""
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with open(file, "rb", buffering=0) as opened:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise OSError(errno.EINVAL, f"is no file but {kind_of_file(os.fstat(file).st_mode)}")
        return opened.readall()


def kind_of_file(mode: int) -> str:
    """What `os.stat(...).st_mode` says it is, for messages."""
    kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder", stat.S_IFREG: "a file"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def lfs_pointer(path: Path) -> str:
    """A message if the file is Git LFS's stand-in for one that was not downloaded, else an empty text."""
    try:
        with open(path, "rb") as file:
            return f"{path}: {_LFS_MESSAGE}" if file.read(len(_LFS)) == _LFS else ""
    except OSError:
        return ""


def printable(name: str) -> str:
    r"""A file's name as text that any terminal and file takes.

    Bytes that are no UTF-8, line ends and other characters that cannot be printed become escapes such as \xe9 and \n.
    """
    return "".join(c if c.isprintable() else _escape(c) for c in name)


def _escape(character: str) -> str:
    number = ord(character)
    if 0xDC80 <= number <= 0xDCFF:  # how Python keeps a byte that is no UTF-8
        return f"\\x{number - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
