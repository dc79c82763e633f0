"""Images in tar files, as WebDataset writes them or as a folder was packed.

Labels are the members `.cls` of the same sample, or the first level of folders.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from dino_fast.data.formats.archive import ArchiveSource, Entries, split_parts
from dino_fast.data.source import Source, lfs_pointer
from dino_fast.errors import UserError


class TarSource(ArchiveSource):
    """The images of tar files."""

    kind = "tar"

    def __init__(self, paths: Sequence[Path]) -> None:
        super().__init__(paths, _read_headers)


def open_tars(paths: Sequence[Path]) -> Source:
    """Opens tar files as one source; folders train/ and val/ or test/ inside them are kept apart. Raises UserError."""
    return split_parts(TarSource(paths))


def _read_headers(path: Path, shard: int, entries: Entries) -> None:
    """Adds the images of one file, which may be several tars behind each other, as `cat` makes them."""
    first = len(entries.lengths)
    labels: dict[str, str] = {}
    keys: list[str] = []
    links: list[tarfile.TarInfo] = []
    parts: list[tarfile.TarFile] = []
    shared: dict[str, str] = {}

    def add(name: str, offset: int, size: int) -> None:
        key, extension = _sample(name)
        if extension == ".cls":
            text = os.pread(file.fileno(), size, offset).decode("utf-8", "replace").strip()
            labels[key] = shared.setdefault(text, text)
        elif entries.wanted(name):
            entries.add(name, shard, offset, size)
            keys.append(key)

    try:
        with open(path, "rb") as file:
            start: int | None = 0
            while start is not None:
                file.seek(start)
                parts.append(tarfile.open(fileobj=file, mode="r:"))  # noqa: SIM115 - it owns nothing
                for member in parts[-1]:
                    if member.isreg():
                        add(member.name, member.offset_data, member.size)
                    elif member.islnk() or member.issym():
                        links.append(member)
                whole = _ends_whole(file, parts[-1].offset)
                start = _next_tar(file, parts[-1].offset) if whole else None
            _follow(links, parts, entries, add)
    except tarfile.ReadError as error:
        if not keys:
            raise UserError(lfs_pointer(path) or f"{path}: not a readable tar file ({error})") from error
        whole = False
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    if not whole:
        count = len(entries.lengths) - first
        entries.notes.append(f"{path} is cut off or damaged after {count} images; the rest of it is left out")
    entries.texts.extend(labels.get(key) for key in keys)


def _follow(
    links: Sequence[tarfile.TarInfo],
    parts: Sequence[tarfile.TarFile],
    entries: Entries,
    add: Callable[[str, int, int], None],
) -> None:
    """Adds images and labels that are links to other members, hard or symbolic."""
    if not links:
        return
    places = {os.path.normpath(m.name): m for part in parts for m in part.getmembers() if m.isreg()}
    pointing = {os.path.normpath(link.name): _target(link) for link in links}
    for link in links:
        target = _target(link)
        for _ in range(8):  # links to links
            if target in places or target not in pointing:
                break
            target = pointing[target]
        member = places.get(target)
        if member is not None:
            add(link.name, member.offset_data, member.size)
        elif entries.wanted(link.name):
            entries.passed_over["links to images that are not in the tar"] += 1


def _target(link: tarfile.TarInfo) -> str:
    """The name of the member that a link means: a hard link's from the root, a symbolic one's from its folder."""
    folder = "" if link.islnk() else os.path.dirname(link.name)
    return os.path.normpath(os.path.join(folder, link.linkname))


def _sample(name: str) -> tuple[str, str]:
    """(what the members of a sample share, the last extension): WebDataset splits at the first dot of the file name."""
    folder, base = os.path.split(name)
    return os.path.join(folder, base.split(".", 1)[0]), os.path.splitext(base)[1].lower()


def _ends_whole(file: BinaryIO, offset: int) -> bool:
    """Whether the mark of a tar file's end stands where its last header was read; tarfile takes a cut for the end."""
    file.seek(offset)
    return file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)


def _next_tar(file: BinaryIO, offset: int) -> int | None:
    """Where the next tar begins behind the zeros that end one; None at the end of the file."""
    file.seek(offset)
    while block := file.read(tarfile.BLOCKSIZE):
        if block.strip(b"\0"):
            return offset
        offset += tarfile.BLOCKSIZE
    return None
