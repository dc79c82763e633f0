"""What a data set's folders mean: which are classes, parts held out, annotations; and which files are passed over.

One rule for folders on disk and for those inside tar and zip files.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dino_fast.data.source import EXTENSIONS, TEST_DIRS, TRAIN_DIRS, printable

ARCHIVES = {".parquet", ".tar", ".zip"}
UNLABELED_DIRS = ("unlabeled", "unlabelled", "unsupervised", "extra")
_IMAGE_DIRS = {"image", "images", "img", "imgs", "jpegimages", "rgb", "leftimg8bit"}
_ANNOTATIONS = {
    *("mask", "masks", "seg", "segm", "segmentation", "segmentations", "segmentationclass", "segmentationobject"),
    *("depth", "depths", "normal", "normals", "flow", "edge", "edges", "gt", "groundtruth", "ground_truth", "gtfine"),
    *("annotation", "annotations", "label", "labels", "matte", "trimap", "trimaps", "saliency", "alpha"),
}
# Pictures in formats that are not read. They are counted, so that nobody takes a part of a data set for the whole.
_UNREAD = {
    *(".dcm", ".dicom", ".jxl", ".exr", ".hdr", ".psd", ".svg", ".eps", ".pdf", ".ico", ".jpf"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".raw", ".nii", ".mha", ".nrrd", ".pcx", ".sgi"),
    *(".npy", ".npz", ".mat", ".mp4", ".mov", ".avi", ".mkv", ".webm", ".pbm", ".pfm", ".svs", ".czi"),
}
_FEW = 0.05  # share of images outside of the class folders below which they look like a mistake
_UNREAD_BYTES = {extension.encode() for extension in _UNREAD - EXTENSIONS}
_ANNOTATION_BYTES = {word.encode() for word in _ANNOTATIONS}


def passed_over(name: bytes) -> str:
    """Why a file is no image to train on although one could look for it there, for counting; empty if nothing is said.

    `name` is the file's name without folders.
    """
    extension = os.path.splitext(name)[1].lower()
    return f"{os.fsdecode(extension)} (not read)" if extension in _UNREAD_BYTES else annotation(name)


def annotation(name: bytes) -> str:
    """`x.mask.png` beside `x.png`, as WebDataset's samples have them."""
    words = name.lower().split(b".")[-2:]
    return f".{os.fsdecode(b'.'.join(words))} (annotations)" if words[0] in _ANNOTATION_BYTES else ""


def counted(reasons: Mapping[str, int]) -> list[str]:
    """A note on what was passed over, if anything was."""
    if not reasons:
        return []
    return ["left out: " + ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items()))]


@dataclass
class Layout:
    """What each folder's images are: arrays [folders].

    `parts` int8: 0 to train on, 1 held out, -1 left out; None where all are 0. `labels` int64, -1 where there is none,
    numbered in the part's own list of `classes`: (to train on, held out).
    """

    parts: np.ndarray | None
    labels: np.ndarray | None
    classes: list[list[str] | None]
    held_out: bytes | None  # the folder of the held-out part
    notes: list[str]


def read_layout(folders: Sequence[bytes], counts: Sequence[int]) -> Layout:
    """What the folders of a data set mean.

    - Where one folder holds all others and no images itself, it is entered.
    - `train/` beside `val/`, `valid/`, `validation/` or `test/` (any case, also `train2017/`): the first of these is
      held out. `unlabeled/` beside `train/` is trained on without labels. Other folders are left out.
    - `images/` beside `masks/`, `annotations/` and the like: the images are taken.
    - Else the first level of sub-folders are the classes, if every image lies in one.

    Args:
        folders: distinct paths relative to the root, parts joined by `/`, empty for the root.
        counts: the number of images in each.
    """
    tree = _Tree([tuple(folder.split(b"/")) if folder else () for folder in folders], counts)
    rows, depth = tree.enter(list(range(len(folders))), 0)
    tops = tree.tops(rows, depth)
    train = {top for top in tops if _part(top) in TRAIN_DIRS}
    unlabeled = {top for top in tops if _part(top) in UNLABELED_DIRS}
    tests = sorted((TEST_DIRS.index(_part(top)), top) for top in tops if _part(top) in TEST_DIRS)
    test = {tests[0][1]} if tests else set()
    labeled, held_out = rows, []
    if train and (test or unlabeled):
        tree.leave_out(rows, depth, train | unlabeled | test)
        labeled = [row for row in rows if tree.top(row, depth) in train]
        held_out = [row for row in rows if tree.top(row, depth) in test]
        tree.parts[held_out] = 1
        tree.notes += [f"{_shown(top)} is trained on without labels" for top in sorted(unlabeled)]
        depth += 1
    elif all(_part(top) in (*TRAIN_DIRS, *TEST_DIRS, *UNLABELED_DIRS) for top in tops):
        labeled = []  # such folders are no classes
    classes = tree.label(labeled, depth)
    test_classes = tree.label(held_out, depth, classes)
    return Layout(
        tree.parts if tree.parts.any() else None,
        None if classes is None and test_classes is None else tree.labels,
        [classes, test_classes],
        b"/".join(tree.paths[held_out[0]][:depth]) if held_out else None,
        tree.notes,
    )


Top = tuple[bytes, ...]  # one folder's name; empty where images lie in no sub-folder


def _part(top: Top) -> str:
    """The folder's name in lower case, without a year."""
    return re.sub(r"[-_]?(19|20)\d\d$", "", os.fsdecode(top[0]).lower()) if top else ""


def _shown(top: Top) -> str:
    return printable(os.fsdecode(b"/".join(top))) + "/" if top else "beside the folders"


class _Tree:
    """The folders' paths, and what is found about each; `rows` number some of them, `depth` is a level of folders."""

    def __init__(self, paths: Sequence[Top], counts: Sequence[int]) -> None:
        self.paths, self.counts = paths, counts
        self.parts, self.labels = np.zeros(len(paths), np.int8), np.full(len(paths), -1, np.int64)
        self.notes: list[str] = []

    def top(self, row: int, depth: int) -> Top:
        return self.paths[row][depth : depth + 1]

    def tops(self, rows: Sequence[int], depth: int) -> set[Top]:
        return {self.top(row, depth) for row in rows}

    def enter(self, rows: list[int], depth: int, known: Sequence[str] = ()) -> tuple[list[int], int]:
        """(rows, depth) inside folders that hold nothing but folders, one, and inside the images' folder beside masks.

        A lone folder that is one of the classes `known` is not entered.
        """
        while rows:
            tops = self.tops(rows, depth)
            named = {top: os.fsdecode(top[0]) for top in tops if top}
            images = {top for top, name in named.items() if name.lower() in _IMAGE_DIRS}
            if images and any(name.lower() in _ANNOTATIONS for name in named.values()):
                self.leave_out(rows, depth, images)
                rows = [row for row in rows if self.top(row, depth) in images]
            elif len(tops) == 1 and named and self._may_enter(rows, depth, next(iter(named.values())), known):
                depth += 1
            else:
                break
        return rows, depth

    def _may_enter(self, rows: Sequence[int], depth: int, name: str, known: Sequence[str]) -> bool:
        """Whether a lone folder is a wrapper, not a class of images."""
        return name == "." or (printable(name) not in known and all(len(self.paths[row]) > depth + 1 for row in rows))

    def leave_out(self, rows: Sequence[int], depth: int, taken: set[Top]) -> None:
        """Leaves out what is not below the folders `taken`, and notes it."""
        left: Counter[str] = Counter()
        for row in rows:
            if self.top(row, depth) not in taken:
                self.parts[row] = -1
                left[_shown(self.paths[row][: depth + 1] if self.top(row, depth) else ())] += self.counts[row]
        if left:
            names = ", ".join(sorted(_shown(top) for top in taken))
            others = ", ".join(f"{name} ({count:,} images)" for name, count in sorted(left.items()))
            self.notes.append(f"the images are those of {names}; left out: {others}")

    def label(self, rows: list[int], depth: int, known: Sequence[str] | None = None) -> list[str] | None:
        """Labels the rows by the first level of folders, and returns the classes; None where an image lies in none."""
        rows, depth = self.enter(rows, depth, known or ())
        tops = self.tops(rows, depth)
        if () in tops:
            if len(tops) > 1:
                flat = sum(self.counts[row] for row in rows if not self.top(row, depth))
                if flat < sum(self.counts[row] for row in rows) * _FEW:
                    self.notes.append(f"no labels from folders, as {flat:,} images lie beside the sub-folders")
            return None
        if all(_part(top) in _IMAGE_DIRS for top in tops):  # also where there is none
            return None
        names = {top: printable(os.fsdecode(top[0])) for top in tops}
        classes = sorted(set(names.values()))
        number = {name: i for i, name in enumerate(classes)}
        for row in rows:
            self.labels[row] = number[names[self.top(row, depth)]]
        return classes
