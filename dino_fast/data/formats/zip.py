"""Images in zip files, as a folder was packed, read at any place: the central directory says where each one lies."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from dino_fast.data.decode import ImageError
from dino_fast.data.formats.archive import ArchiveSource, Entries, split_parts
from dino_fast.data.source import Source, lfs_pointer
from dino_fast.errors import UserError

_HEADER = struct.Struct("<4s22xHH")  # of a member: the mark, the lengths of its name and of its extra field
_DEFLATED = zipfile.ZIP_DEFLATED


class ZipSource(ArchiveSource):
    """The images of zip files, stored or deflated."""

    kind = "zip"

    def __init__(self, paths: Sequence[Path]) -> None:
        super().__init__(paths, _read_headers)

    def data(self, index: int) -> bytes:
        """The encoded file. Raises ImageError naming the image."""
        at, size = int(self._arrays["offsets"][index]), int(self._arrays["sizes"][index])
        mark, name, extra = _HEADER.unpack(self._read(index, _HEADER.size, at))
        if mark != b"PK\3\4":
            raise ImageError(f"{self.name(index)}: the zip file is damaged: no header where this image should begin")
        data = self._read(index, size, at + _HEADER.size + name + extra)
        if self._arrays["methods"][index] == _DEFLATED:
            try:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, int(self._arrays["lengths"][index]))
            except zlib.error as error:
                raise ImageError(f"{self.name(index)}: the zip file is damaged ({error})") from error
        if zlib.crc32(data) != self._arrays["checksums"][index]:
            raise ImageError(f"{self.name(index)}: the zip file is damaged: the image's checksum is wrong")
        return data


def open_zips(paths: Sequence[Path]) -> Source:
    """Opens zip files as one source; folders train/ and val/ or test/ inside them are kept apart. Raises UserError."""
    return split_parts(ZipSource(paths))


def _read_headers(path: Path, shard: int, entries: Entries) -> None:
    try:
        with zipfile.ZipFile(path) as file:
            members = file.infolist()
    except zipfile.BadZipFile as error:
        raise UserError(lfs_pointer(path) or f"{path}: not a readable zip file ({error})") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    for member in members:
        if member.is_dir() or not entries.wanted(member.filename):
            continue
        if member.flag_bits & 1:
            entries.passed_over["encrypted"] += 1
        elif member.compress_type not in (zipfile.ZIP_STORED, _DEFLATED):
            entries.passed_over[f"compressed by zip's method {member.compress_type}, which is not read"] += 1
        else:
            entries.add(
                member.filename,
                shard,
                member.header_offset,
                member.compress_size,
                lengths=member.file_size,
                methods=member.compress_type,
                checksums=member.CRC,
            )
    entries.texts.extend([None] * (len(entries.lengths) - len(entries.texts)))
