"""Numbered sets of images; `open_source` makes one of a path or of a Python object.

What is wrong with a source as a whole is a UserError when it is opened; what is wrong with one image is an ImageError
when it is read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from dino_fast.data.decode import ImageError, Jpeg, decode, jpeg_or_pixels
from dino_fast.errors import UserError

T = TypeVar("T")
TRAIN_DIRS, TEST_DIRS = ("train", "training"), ("val", "test", "valid", "validation", "testing")


class Source:
    """A numbered set of images, some with labels.

    `channels` is what `read` converts to: 3 unless the images are known to be grey; set it to 1 or 3 to choose.
    `labels` is int64 [len] with -1 where there is none, or None where no image has one.
    """

    channels: int = 3
    classes: list[str] | None = None
    labels: np.ndarray | None = None
    test: Source | None = None  # the held-out part that came with it

    def __len__(self) -> int:
        raise TypeError(f"{type(self).__name__} does not say how many images it has")

    def name(self, index: int) -> str:
        """What to call the image in a message: its path, or file and row."""
        raise TypeError(f"{type(self).__name__} does not name its images")

    def read(self, index: int) -> Tensor:
        """uint8 [channels, H, W]. Raises ImageError naming the image."""
        return self._decoded(index, decode)

    def jpeg_or_pixels(self, index: int) -> Jpeg | Tensor:
        """The file of an ordinary JPEG, for a GPU to decode; else what `read` returns."""
        return self._decoded(index, jpeg_or_pixels)

    def _decoded(self, index: int, how: Callable[[bytes, int], T]) -> T:
        data = self.data(index)
        try:
            return how(data, self.channels)
        except ImageError as error:
            raise ImageError(f"{self.name(index)}: {error}") from error

    def data(self, index: int) -> bytes:
        """The encoded file. Raises ImageError naming the image."""
        raise TypeError(f"{type(self).__name__} has no encoded images")

    def prepare(self) -> None:
        """Does once, before workers are forked, what each of them would otherwise do: imports what decodes."""
        import torchvision.io  # noqa: F401 - takes a second

    def label(self, index: int) -> int | None:
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

    def name(self, index: int) -> str:
        return f"{self._name}, image {index}"

    def prepare(self) -> None:
        """Nothing: the images are decoded."""

    def jpeg_or_pixels(self, index: int) -> Jpeg | Tensor:
        return self.read(index)

    def read(self, index: int) -> Tensor:
        image = self.images[index]
        if self.channels == len(image):
            return image
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
        self.labels = None if source.labels is None else source.labels[indices]

    @property
    def channels(self) -> int:  # type: ignore[override]
        return self.source.channels

    @channels.setter
    def channels(self, value: int) -> None:
        self.source.channels = value

    def __len__(self) -> int:
        return len(self.indices)

    def prepare(self) -> None:
        self.source.prepare()

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))

    def read(self, index: int) -> Tensor:
        return self.source.read(int(self.indices[index]))

    def jpeg_or_pixels(self, index: int) -> Jpeg | Tensor:
        return self.source.jpeg_or_pixels(int(self.indices[index]))

    def data(self, index: int) -> bytes:
        return self.source.data(int(self.indices[index]))


def open_source(given: Any) -> Source:
    """Opens images from whatever holds them.

    A path or string: `demo`; a folder of images, of .parquet or of .tar files, or one that `datasets` saved; a
    .parquet, .tar or .npy file; a text file with one image path a line; a pattern with * ? [] or {000..099}.
    A Python object: a source; a `datasets.Dataset` or `DatasetDict`; a uint8 array or tensor, or a pair of it and its
    labels.

    A folder with train/ beside val/ or test/ opens its train/ and keeps the other as `.test`. In a folder where every
    image lies in a sub-folder, the first level of sub-folders are the classes. Raises UserError saying what was found
    and what is accepted.
    """
    if isinstance(given, Source):
        return given
    if not isinstance(given, str | os.PathLike):
        return _open_object(given)
    if str(given) == "demo":
        from dino_fast.data.formats.demo import open_demo

        return open_demo()
    path = Path(given).expanduser()
    if path.is_dir():
        return _open_folder(path)
    if path.exists():
        return _open_file(path)
    if any(character in str(path) for character in "*?[{"):
        return _open_files(expand(str(path)), str(path))
    raise UserError(
        f"{path} does not exist; give a folder, a .parquet, .tar or .npy file, a text file listing images, "
        "a pattern such as 'photos/*.jpg', or 'demo'"
    )


def split(source: Source) -> tuple[Source, Source]:
    """(what to train and build the k-NN bank on, what to hold out): the test part that came with the source, else a
    seeded tenth of it. The two share no image."""
    if source.test is not None:
        return source, source.test
    if len(source) < 2:
        raise UserError(f"{len(source)} image cannot be split into training and held-out images; give at least 2")
    order = np.random.default_rng(0).permutation(len(source))
    count = max(1, len(source) // 10)
    return Subset(source, np.sort(order[count:])), Subset(source, np.sort(order[:count]))


def held_out(source: Source) -> Source:
    """The second part of `split`."""
    return split(source)[1]


def expand(pattern: str) -> list[Path]:
    """The files that a pattern stands for, in order: * ? [] ** as a shell does, {a,b} and {000..099}."""
    import glob
    import re

    braces = re.search(r"\{([^{}]*)\}", pattern)
    if braces:
        first = re.fullmatch(r"(\d+)\.\.(\d+)", braces[1])
        inside = (
            [str(n).zfill(len(first[1])) for n in range(int(first[1]), int(first[2]) + 1)]
            if first
            else braces[1].split(",")
        )
        return [path for text in inside for path in expand(pattern[: braces.start()] + text + pattern[braces.end() :])]
    if glob.has_magic(pattern):
        return sorted(path for path in map(Path, glob.iglob(pattern, recursive=True)) if path.is_file())
    return [Path(pattern)]


def _open_object(given: Any) -> Source:
    if isinstance(given, Mapping) and any(name in given for name in (*TRAIN_DIRS, *TEST_DIRS)):
        parts = [next((given[name] for name in names if name in given), None) for names in (TRAIN_DIRS, TEST_DIRS)]
        opened = [open_source(part) for part in parts if part is not None]
        return _pair(*opened) if len(opened) == 2 else opened[0]
    if hasattr(given, "with_format") and hasattr(given, "column_names"):
        from dino_fast.data.formats.hugging_face import DatasetSource

        return DatasetSource(given)
    images, labels = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
    if not isinstance(images, Tensor | np.ndarray):
        raise UserError(
            f"cannot open a {type(given).__name__}; give a path, a uint8 array or tensor of images (or a pair of it "
            "and its labels), or a datasets.Dataset"
        )
    return ArraySource(channels_first(images), None if labels is None else np.asarray(labels))


def channels_first(images: np.ndarray | Tensor) -> Tensor:
    """[N, H, W], [N, H, W, C] or [N, C, H, W] -> [N, C, H, W], without a copy; C is 1 or 3."""
    tensor = torch.from_numpy(images) if isinstance(images, np.ndarray) else images
    if tensor.dim() == 3:
        return tensor[:, None]
    if tensor.dim() != 4:
        return tensor  # refused by ArraySource
    first, last = tensor.shape[1] in (1, 3), tensor.shape[3] in (1, 3)
    if first and last:
        raise UserError(f"images of shape {list(tensor.shape)}: which is the channel? Give a torch tensor [N, C, H, W]")
    return tensor.permute(0, 3, 1, 2) if last else tensor


def _open_folder(root: Path) -> Source:
    train = next((root / name for name in TRAIN_DIRS if (root / name).is_dir()), None)
    test = next((root / name for name in TEST_DIRS if (root / name).is_dir()), None)
    if (root / "dataset_info.json").is_file() or (root / "dataset_dict.json").is_file():
        from dino_fast.data.formats.hugging_face import saved

        return _open_object(saved(root))
    if train and test:
        return _pair(_open_folder(train), _open_folder(test))
    from dino_fast.data.formats.folder import EXTENSIONS, open_images, walk

    images = open_images(root)
    if images is not None:
        return images
    found = [
        Path(folder.path) / os.fsdecode(name) for folder in walk(root, {".parquet", ".tar"}) for name in folder.files
    ]
    if not found:
        raise UserError(
            f"{root} holds no images (looked in all sub-folders for {', '.join(sorted(EXTENSIONS))}) "
            "and no .parquet or .tar files"
        )
    parts = {p: [file for file in found if file.name.startswith(p)] for p in (*TRAIN_DIRS, *TEST_DIRS)}
    training = next((parts[p] for p in TRAIN_DIRS if parts[p]), None)
    testing = next((parts[p] for p in TEST_DIRS if parts[p]), None)
    if not (training and testing):
        return _open_files(found, str(root))
    return _pair(_open_files(training, str(root)), _open_files(testing, str(root)))


def _open_file(path: Path) -> Source:
    if path.suffix.lower() == ".npy":
        return _open_object(_mapped(path))
    if path.suffix.lower() in (".parquet", ".tar"):
        return _open_files([path], str(path))
    if path.name.lower().endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")):
        raise UserError(
            f"{path} is a compressed tar, of which single images cannot be read. Unpack it to a .tar (images are "
            "compressed already, so it will hardly be larger), or to a folder"
        )
    from dino_fast.data.formats.folder import open_list

    return open_list(path)


def _mapped(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable array of numpy ({error})") from error


def _open_files(paths: list[Path], given: str) -> Source:
    """Shards of one kind, or single images."""
    from dino_fast.data.formats.folder import EXTENSIONS, open_paths

    if not paths:
        raise UserError(f"{given} matches no file")
    suffixes = {path.suffix.lower() for path in paths}
    if suffixes == {".parquet"}:
        from dino_fast.data.formats.parquet import ParquetSource

        return ParquetSource(paths)
    if suffixes == {".tar"}:
        from dino_fast.data.formats.tar import open_tars

        return open_tars(paths)
    if suffixes <= EXTENSIONS:
        return open_paths(paths)
    raise UserError(
        f"{given} has files of {', '.join(sorted(suffixes)[:8])}; expected images, or .parquet files alone, or .tar "
        "files alone"
    )


def _pair(train: Source, test: Source) -> Source:
    share_classes(train, test)
    train.test = test
    return train


def share_classes(train: Source, test: Source) -> None:
    """Numbers the classes of both parts alike; classes that only the test part has come last."""
    if train.classes is None or test.classes is None or test.labels is None or train.classes == test.classes:
        return
    names = train.classes + [name for name in test.classes if name not in set(train.classes)]
    test.labels = np.asarray([names.index(name) for name in test.classes], dtype=np.int64)[test.labels]
    train.classes = test.classes = names
