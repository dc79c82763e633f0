"""Opens images from whatever holds them: a path, a pattern, a Python object; and splits a source in two."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dino_fast.data.formats import demo, folder, hugging_face, lists, parquet, python, tar, zip
from dino_fast.data.formats.layout import ARCHIVES, UNLABELED_DIRS
from dino_fast.data.labels import share_classes
from dino_fast.data.source import EXTENSIONS, TEST_DIRS, TRAIN_DIRS, Source, SourceNote, Subset, kind_of_file
from dino_fast.errors import UserError

IN_MEMORY = "python:"  # how a run's config.yaml begins the name of images that a program gave as an object


def open_source(given: Any) -> Source:
    """Opens images from whatever holds them.

    A path or string: `demo`; a folder of images, of .parquet, .tar or .zip files, or one that `datasets` saved; a
    .parquet, .tar, .zip or .npy file; a text file with one image path a line; a pattern with * ? [] or {000..099}.
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
    for note in source.all_notes():
        warnings.warn(note, SourceNote, stacklevel=2)
    return source


def _open(given: Any) -> Source:
    if not isinstance(given, str | os.PathLike):
        return _open_object(given)
    if str(given) == "demo":
        return demo.open_demo()
    if str(given).startswith(IN_MEMORY):
        raise UserError(
            f"the images ({str(given).removeprefix(IN_MEMORY)}) were given from Python as an object: give them so "
            "again (dino_fast.train(data=..., resume=True)), or say with --data where they are"
        )
    path = Path(given).expanduser()
    if path.is_dir():
        return _open_folder(path)
    if path.exists():
        return _open_file(path)
    if any(character in str(path) for character in "*?[{"):
        return _open_files(expand(str(path)), str(path))
    raise UserError(
        f"{path} does not exist; give a folder, a .parquet, .tar, .zip or .npy file, a text file listing images, "
        "a pattern such as 'photos/*.jpg', or 'demo'"
    )


def split(source: Source, share: float = 0.1) -> tuple[Source, Source]:
    """The part to train and build the k-NN bank on, and the part to hold out. They share no image.

    Held out is the test part that came with the source, else a seeded share of it, at least one image.
    """
    if source.test is not None:
        return source, source.test
    if len(source) < 2:
        raise UserError(f"{len(source)} image cannot be split into training and held-out images; give at least 2")
    order = np.random.default_rng(0).permutation(len(source))
    count = max(1, math.floor(len(source) * share + 1e-9))
    return Subset(source, np.sort(order[count:])), Subset(source, np.sort(order[:count]))


def expand(pattern: str) -> list[Path]:
    """The files that a pattern stands for, in order: * ? [] ** as a shell does, {a,b} and {000..099}."""
    import glob

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
    if (root / "dataset_info.json").is_file() or (root / "dataset_dict.json").is_file():
        return _open_object(hugging_face.load_saved(root))
    images, shards, notes = folder.open_images(root)
    if not shards and images is not None:
        return images
    if not shards:
        arrays = folder.open_images(root, {".npy"}).images  # elsewhere they are masks and features, beside the images
        if arrays is not None:
            return arrays
        raise UserError(
            f"{root} holds no images (looked in all sub-folders for {', '.join(sorted(EXTENSIONS))}) "
            f"and no .parquet, .tar, .zip or .npy files{''.join(f' ({note})' for note in notes)}"
        )
    kinds = {suffix: [shard for shard in shards if shard.suffix.lower() == suffix] for suffix in sorted(ARCHIVES)}
    kinds = {suffix: files for suffix, files in kinds.items() if files}
    if images is None and len(kinds) == 1:
        return _open_shards(shards, root, notes)
    return _most(root, images, kinds, notes)


def _most(root: Path, images: Source | None, kinds: dict[str, list[Path]], notes: Sequence[str]) -> Source:
    """Of image files and shards of several kinds in one folder, what holds most images; a note says what is left."""
    counts = {} if images is None else {"image files": len(images) + (len(images.test) if images.test else 0)}
    for suffix, files in kinds.items():
        try:
            counts[f"{suffix} files"] = _count(suffix, files)
        except UserError as error:
            counts[f"{suffix} files"] = 0
            if images is None and len(counts) == len(kinds) and not any(counts.values()):
                raise UserError(f"{root} holds no images: {error}") from error
    best = max(counts, key=lambda name: counts[name])
    left = ", ".join(f"{count:,} in {name}" for name, count in counts.items() if name != best)
    note = f"{root}: the images are the {counts[best]:,} in {best}; left out: {left}"
    if images is not None and best == "image files":
        images.notes = [*images.notes, note]
        return images
    return _open_shards(kinds[best.removesuffix(" files")], root, [note])


def _count(suffix: str, files: list[Path]) -> int:
    """Images in shards of one kind. Raises UserError where one cannot be read."""
    if suffix == ".parquet":
        return parquet.count_rows(files)
    source = _open_files(files, "")
    return len(source) + (len(source.test) if source.test else 0)


def _open_shards(shards: list[Path], root: Path, notes: Sequence[str]) -> Source:
    """Shards of one kind; those of train and val, by their folder or the beginning of their name, are kept apart."""
    parts: dict[str, list[Path]] = {}
    for shard in shards:
        parts.setdefault(_part_of(shard, root), []).append(shard)
    training = [shard for shard in shards if _part_of(shard, root) in (*TRAIN_DIRS, *UNLABELED_DIRS)]
    testing = next((name for name in TEST_DIRS if name in parts), None)
    if testing is None or not any(name in parts for name in TRAIN_DIRS):
        source = _open_files(shards, str(root))
    else:
        source = _pair(_open_files(training, str(root)), _open_files(parts[testing], str(root)))
        left = [shard for shard in shards if shard not in set(training) | set(parts[testing])]
        if left:
            names = ", ".join(str(shard.relative_to(root)) for shard in left[:5]) + (", ..." if len(left) > 5 else "")
            notes = [*notes, f"{root}: {testing} is held out; left out: {len(left)} files ({names})"]
    source.notes = [*source.notes, *notes]
    return source


def _part_of(shard: Path, root: Path) -> str:
    """The part that a shard belongs to: train/x.parquet, train-00000-of-00010.parquet, Train2017.tar."""
    names = shard.relative_to(root).parts
    for name in names:
        part = re.match(r"[a-z]*", name.lower())
        if part and part[0] in (*TRAIN_DIRS, *TEST_DIRS, *UNLABELED_DIRS):
            return part[0]
    return ""


def _open_file(path: Path) -> Source:
    if not path.is_file():
        raise UserError(f"{path} is {kind_of_file(path.stat().st_mode)}, not a file of images or a list of them")
    if path.suffix.lower() == ".npy":
        return python.open_images(_mapped(path), name=str(path))
    if path.suffix.lower() in ARCHIVES:
        return _open_files([path], str(path))
    if path.name.lower().endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")):
        raise UserError(
            f"{path} is a compressed tar, of which single images cannot be read. Unpack it to a .tar (images are "
            "compressed already, so it will hardly be larger), or to a folder"
        )
    return lists.open_list(path)


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
    if suffixes == {".zip"}:
        return zip.open_zips(paths)
    if suffixes <= EXTENSIONS:
        return folder.open_paths(paths)
    raise UserError(
        f"{given} has files of {', '.join(sorted(suffixes)[:8])}; expected images, or .parquet, .tar or .zip "
        "files alone"
    )


def _pair(train: Source, test: Source) -> Source:
    share_classes(train, test)
    train.test = test
    return train
