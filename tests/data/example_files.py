"""Small images and files of them, for the tests."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as arrow
import pyarrow.parquet
from PIL import Image


def picture(mode: str = "RGB", size: tuple[int, int] = (20, 12)) -> Image.Image:
    """Left half dark red, right half bright; each mode the nearest it has."""
    pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    pixels[:, : size[0] // 2] = (120, 10, 10)
    pixels[:, size[0] // 2 :] = (250, 240, 230)
    image = Image.fromarray(pixels)
    return image.quantize(8) if mode == "P" else image.convert(mode)


def save(path: Path, image: Image.Image | None = None, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or picture()).save(path, **options)
    return path


def png(value: int) -> bytes:
    data = io.BytesIO()
    Image.new("L", (5, 4), value).save(data, "PNG")
    return data.getvalue()


def hugging_face(path: Path, rows: list, labels: list | None = None, metadata: dict | None = None) -> Path:
    kind = arrow.struct({"bytes": arrow.binary(), "path": arrow.string()})
    columns = {"image": arrow.array(rows, type=kind)} | ({"label": arrow.array(labels)} if labels else {})
    arrow.parquet.write_table(arrow.table(columns).replace_schema_metadata(metadata), path)
    return path


def pack(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def shard(path: Path, first: int, count: int, label: bool = True) -> Path:
    members: dict[str, bytes] = {}
    for i in range(first, first + count):
        members[f"{i:06d}.png"] = png(i)
        if label:
            members[f"{i:06d}.cls"] = str(i % 3).encode()
        members[f"{i:06d}.json"] = b"{}"
    return pack(path, members)
