"""Opens images from whatever holds them: a path, a pattern, a Python object; and splits a source in two."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dino_fast.data.formats import demo, folder, hugging_face, parquet, python, tar
from dino_fast.data.labels import share_classes
from dino_fast.data.source import EXTENSIONS, TEST_DIRS, TRAIN_DIRS, Source, Subset
from dino_fast.errors import UserError


def open_source(given: Any) -> Source:
    """Opens images from whatever holds them.

    A path or string: `demo`; a folder of images, of .parquet or of .tar files, or one that `datasets` saved; a
    .parquet, .tar or .npy file; a text file with one image path a line; a pattern with * ? [] or {000..099}.
    A Python object: a source; a `datasets.Dataset` or `DatasetDict`; an array or tensor [N, H, W], [N, H, W, C] or
    [N, C, H, W] of uint8, floats from 0 to 1 or other numbers; a list of arrays, images of PIL and paths; a pair of any
    of these and its labels; {"images": ..., "labels": ..., "range": (black, white)}; a `torch.utils.data.Dataset` of
    images or (image, label), a mapping of such for "train" and "val".

    A folder with train/ beside val/ or test/ opens its train/ and keeps the other as `.test`. In a folder where every
    image lies in a sub-folder, the first level of sub-folders are the classes. Raises UserError saying what was found
    and what is accepted.
    """
    if isinstance(given, Source):
        return given
    source = _open(given)
    for part in (source, source.test):
        for note in () if part is None else (*part.notes, part.unused_labels):
            if note:
                warnings.warn(note, stacklevel=2)
    return source


def _open(given: Any) -> Source:
    if not isinstance(given, str | os.PathLike):
        return _open_object(given)
    if str(given) == "demo":
        return demo.open_demo()
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


def split(source: Source, share: float = 0.1) -> tuple[Source, Source]:
    """(what to train and build the k-NN bank on, what to hold out): the test part that came with the source, else a
    seeded share of it, at least one image. The two share no image."""
    if source.test is not None:
        return source, source.test
    if len(source) < 2:
        raise UserError(f"{len(source)} image cannot be split into training and held-out images; give at least 2")
    order = np.random.default_rng(0).permutation(len(source))
    count = max(1, math.floor(len(source) * share + 1e-9))
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
        opened = [part if isinstance(part, Source) else _open(part) for part in parts if part is not None]
        return _pair(*opened) if len(opened) == 2 else opened[0]
    if hasattr(given, "with_format") and hasattr(given, "column_names"):
        if not hasattr(given, "__len__"):
            raise UserError(
                "a streamed datasets.IterableDataset does not say how many images it has, and training reads them in "
                "another order in every epoch; load it without streaming=True"
            )
        return hugging_face.DatasetSource(given)
    if isinstance(given, Mapping) and "images" in given:
        if unknown := sorted(map(str, given.keys() - {"images", "labels", "range"})):
            raise UserError(f"images in memory have 'images', 'labels' and 'range', not {', '.join(unknown)}")
        return python.open_images(given["images"], given.get("labels"), value_range=given.get("range"))
    if isinstance(given, tuple) and len(given) == 2 and not python.are_images(*given):
        return python.open_images(*given)
    return python.open_images(given)


def _open_folder(root: Path) -> Source:
    train = next((root / name for name in TRAIN_DIRS if (root / name).is_dir()), None)
    test = next((root / name for name in TEST_DIRS if (root / name).is_dir()), None)
    if (root / "dataset_info.json").is_file() or (root / "dataset_dict.json").is_file():
        return _open_object(hugging_face.load_saved(root))
    if train and test:
        return _pair(_open_folder(train), _open_folder(test))
    images = folder.open_images(root)
    if images is not None:
        return images
    found = [
        Path(place.path) / os.fsdecode(name)
        for place in folder.walk(root, {".parquet", ".tar"})
        for name in place.files
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
        return python.open_images(_mapped(path), name=str(path))
    if path.suffix.lower() in (".parquet", ".tar"):
        return _open_files([path], str(path))
    if path.name.lower().endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")):
        raise UserError(
            f"{path} is a compressed tar, of which single images cannot be read. Unpack it to a .tar (images are "
            "compressed already, so it will hardly be larger), or to a folder"
        )
    return folder.open_list(path)


def _mapped(path: Path) -> np.ndarray:
    try:
        array: np.ndarray = np.load(path, mmap_mode="c", allow_pickle=False)
        return array
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable array of numpy ({error})") from error


def _open_files(paths: list[Path], given: str) -> Source:
    """Shards of one kind, or single images."""
    if not paths:
        raise UserError(f"{given} matches no file")
    suffixes = {path.suffix.lower() for path in paths}
    if suffixes == {".parquet"}:
        return parquet.ParquetSource(paths)
    if suffixes == {".tar"}:
        return tar.open_tars(paths)
    if suffixes <= EXTENSIONS:
        return folder.open_paths(paths)
    raise UserError(
        f"{given} has files of {', '.join(sorted(suffixes)[:8])}; expected images, or .parquet files alone, or .tar "
        "files alone"
    )


def _pair(train: Source, test: Source) -> Source:
    share_classes(train, test)
    train.test = test
    return train
