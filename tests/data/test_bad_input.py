"""What goes wrong while a run goes on: skipped with a count, or stopped with the file's name."""

from __future__ import annotations

import io
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dino_fast.augment import MultiCrop
from dino_fast.data import ImageError, open_source, train_loader
from dino_fast.errors import UserError

from .example_files import picture, png, save, shard

CROPS = MultiCrop(global_size=16, local_size=8, n_local=2)


def photos(root: Path, count: int) -> Path:
    root.mkdir()
    for i in range(count):
        (root / f"{i:03d}.png").write_bytes(png(i))
    return root


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["folder", "tars"])
def test_a_disk_that_disappears_stops_the_run_and_names_a_file(tmp_path: Path, workers: int, kind: str) -> None:
    root = tmp_path / "disk"
    if kind == "folder":
        photos(root, 200)
    else:
        root.mkdir()
        shard(root / "a.tar", 0, 200)
    source = open_source(root)
    loader = train_loader(
        source, CROPS, batch_size=8, seed=0, workers=workers, max_bad=1.0, on_bad=lambda line: None
    )  # fmt: skip
    batches = iter(loader)
    first = next(batches)
    assert len(first.index) == 8 and not first.bad
    if kind == "tars":
        os.truncate(root / "a.tar", 512)  # an open file outlives its name; a lost disk gives short or failing reads
    root.rename(tmp_path / "gone")
    expected = r"in a row cannot be read; is the disk still there\? The last: .*/disk/.*(No such file|cut off)"
    with pytest.raises(UserError, match=expected):
        for _ in range(100):
            next(batches)


def test_a_file_deleted_during_training_is_skipped_and_counted(tmp_path: Path) -> None:
    source = open_source(photos(tmp_path / "disk", 40))
    loader = train_loader(source, CROPS, batch_size=4, seed=0, epochs=1, on_bad=lambda line: None)
    batches = iter(loader)
    used = next(batches).index.tolist()
    missing = next(i for i in range(40) if i not in used)
    source.path(missing).unlink()
    rest = torch.cat([batch.index for batch in batches])
    assert len(rest) == 36 and missing not in rest and list(loader.bad) == [missing]


def test_a_worker_killed_from_outside_stops_the_run(tmp_path: Path) -> None:
    source = open_source(photos(tmp_path / "x", 200))
    before = children()
    batches = iter(train_loader(source, CROPS, batch_size=4, seed=0, workers=2))
    next(batches)
    worker = min(children() - before)
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(UserError, match=r"a data-loading worker died .*--workers 0"):
        for _ in range(500):
            next(batches)


def test_what_a_worker_raises_is_no_death(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake in a program of one's own keeps its type and its traceback."""
    source = open_source(photos(tmp_path / "x", 20))

    def read(index: int) -> torch.Tensor:
        raise RuntimeError("a mistake")

    monkeypatch.setattr(source, "read", read)
    with pytest.raises(RuntimeError, match=r"Caught RuntimeError in DataLoader worker(.|\n)*a mistake"):
        next(iter(train_loader(source, CROPS, batch_size=4, seed=0, workers=1)))


def children() -> set[int]:
    """Process ids of this process's children."""
    return {int(p) for task in Path("/proc/self/task").iterdir() for p in (task / "children").read_text().split()}


def test_unusual_images_among_others_give_finite_crops(tmp_path: Path) -> None:
    """All of them in one batch, through a worker."""
    save(tmp_path / "dot.png", Image.new("RGB", (1, 1), "red"))
    save(tmp_path / "strip.jpg", Image.new("RGB", (30000, 20), (10, 200, 30)))
    save(tmp_path / "tall.png", Image.new("L", (20, 30000), 99))
    save(tmp_path / "cmyk.jpg", picture("CMYK"))
    save(tmp_path / "palette.png", picture("P"))
    frames = [picture("RGB"), Image.new("RGB", (20, 12), "blue")]
    for suffix in ("gif", "webp", "png", "tif"):
        save(tmp_path / f"animated.{suffix}", frames[0], save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[0x0112] = 8
    save(tmp_path / "turned.jpg", picture(), exif=exif)
    source = open_source(tmp_path)
    loader = train_loader(source, CROPS, batch_size=len(source), seed=0, epochs=1, workers=1)
    (batch,) = loader
    assert not loader.bad and batch.global_crops.isfinite().all() and batch.local_crops.isfinite().all()
    for i in range(len(source)):
        if Path(source.name(i)).stem == "animated":
            assert source.read(i)[:, 6, 3].int().sub(torch.tensor([120, 10, 10])).abs().max() < 20  # the first frame
        if Path(source.name(i)).stem == "strip":
            assert source.read(i).shape == (3, 20, 30000)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF"])
def test_a_decompression_bomb_is_refused_before_memory_is_asked_for(tmp_path: Path, kind: str) -> None:
    """A small file whose header claims 60,000 x 60,000 pixels (10 GB), or one that holds 30,000 x 3,000."""
    data = io.BytesIO()
    Image.new("L", (64, 64)).save(data, kind)
    claimed, at = bytearray(data.getvalue()), data.getvalue().index(b"\xff\xc0") if kind == "JPEG" else 0
    if kind == "PNG":
        import zlib

        claimed[16:24] = (60000).to_bytes(4, "big") * 2
        claimed[29:33] = zlib.crc32(claimed[12:29]).to_bytes(4, "big")
    elif kind == "JPEG":
        claimed[at + 5 : at + 9] = (60000).to_bytes(2, "big") * 2
    else:
        claimed[6:10] = (60000).to_bytes(2, "little") * 2
    path = tmp_path / f"bomb.{kind.lower()}"
    path.write_bytes(claimed)
    start = time.perf_counter()
    with pytest.raises(ImageError, match=rf"{path.name}: .*(decompression bomb|truncated|cannot be decoded)"):
        open_source(tmp_path).read(0)
    assert time.perf_counter() - start < 1


def test_zero_bytes_and_truncation_are_skipped_with_a_count(tmp_path: Path) -> None:
    root = photos(tmp_path / "x", 100)
    whole = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(whole).save(root / "000.jpg")
    data = (root / "000.jpg").read_bytes()
    (root / "000.jpg").unlink()
    (root / "001.png").write_bytes(b"")
    (root / "002.png").write_bytes(data[: len(data) // 3])
    said: list[str] = []
    loader = train_loader(open_source(root), CROPS, batch_size=10, seed=0, epochs=1, workers=2, on_bad=said.append)
    assert len(list(loader)) == 10 and len(loader.bad) == 2
    assert sorted(line.split(": ", 1)[1].split(": ")[0][-7:] for line in said) == ["001.png", "002.png"]
    assert {line.partition(")")[0] for line in said} == {f"skipped an unreadable image ({n} so far" for n in (1, 2)}
