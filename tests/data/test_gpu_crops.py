"""Batches that travel as uint8 or as files give the CPU's crops; without a GPU the other end is a CPU too."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from dino_fast.augment import MultiCrop
from dino_fast.backends import cuda_unavailable_reason
from dino_fast.data import ArraySource, ImageError, Source, gpu_crops, open_source, train_loader
from dino_fast.data import decode as decode_module
from dino_fast.data.decode import Jpeg
from dino_fast.data.train_loader import CropDataset
from dino_fast.engine.build import resolve_crop_device
from dino_fast.engine.config import build_config
from dino_fast.engine.trainer import train
from dino_fast.errors import UserError

from .example_files import picture, save
from .test_train_loader import CROPS, Broken, images, same

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(cuda_unavailable_reason() is not None, reason=str(cuda_unavailable_reason()))


def load(source: Source, **options) -> list:
    options = {"batch_size": 6, "seed": 3, "epochs": 2, "on_bad": lambda line: None} | options
    return list(train_loader(source, CROPS, **options))


@pytest.fixture
def mixed(tmp_path: Path) -> Source:
    """Ordinary JPEGs of several sizes among images that only the CPU decodes."""
    for i in range(6):
        save(tmp_path / f"{i}.jpg", picture().resize((20 + 7 * i, 40 - 3 * i)))
    save(tmp_path / "grey.jpg", picture("L"))
    save(tmp_path / "cmyk.jpg", picture("CMYK"))
    save(tmp_path / "palette.png", picture("P"))
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "turned.jpg", picture(), exif=exif)
    return open_source(tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("encoded", [False, True])
def test_crops_are_the_same(mixed: Source, workers: int, encoded: bool) -> None:
    here, there = load(mixed), load(mixed, workers=workers, gpu=CPU, encoded=encoded)
    assert len(here) == len(there) == 2 and all(map(same, here, there))
    assert all(batch.packed is None for batch in there)


def test_a_batch_travels_as_bytes(mixed: Source) -> None:
    """What a worker hands over is as large as the images, or the files, and not as the crops."""
    crops = MultiCrop()
    wanted = list(range(len(mixed)))
    for encoded in (False, True):
        batch = CropDataset(mixed, crops, 0, True, encoded, torch.empty(0))[0, 0, wanted]
        kinds = {mixed.name(i).rsplit("/", 1)[1]: row[3] for i, row in enumerate(batch.packed.shapes.tolist())}
        files = {name for name, size in kinds.items() if size}
        ordinary = {f"{i}.jpg" for i in range(6)} | {"grey.jpg"}
        assert files == (ordinary if encoded else set())
        assert batch.packed.buffer.dtype == torch.uint8 and batch.global_crops.numel() == 0
        pixels = [mixed.read(i) for i in wanted]
        size = sum(mixed.data(i).__len__() if row[3] else p.numel()
                   for i, (row, p) in enumerate(zip(batch.packed.shapes.tolist(), pixels, strict=True)))  # fmt: skip
        assert len(batch.packed.buffer) == size
        unpacked = gpu_crops.unpack(batch.packed, CPU, str)
        assert all(torch.equal(a, b) for a, b in zip(unpacked, pixels, strict=True))


def test_images_in_memory() -> None:
    source = ArraySource(images(20))
    assert all(map(same, load(source), load(source, gpu=CPU, encoded=True)))


def test_bad_images_are_replaced_as_on_the_cpu() -> None:
    source = Broken(images(100), {4, 9})
    assert all(map(same, load(source), load(source, gpu=CPU, workers=1)))


def test_a_failure_comes_after_the_batch_before_it() -> None:
    class Dying(ArraySource):
        def read(self, index: int) -> torch.Tensor:
            if self.left == 0:
                raise ImageError(f"{self.name(index)}: gone")
            self.left -= 1
            return super().read(index)

    for gpu in (None, CPU):
        source = Dying(images(60))
        source.left = 17
        seen = []
        with pytest.raises(UserError, match="is the disk still there"):
            for batch in train_loader(
                source, CROPS, batch_size=6, seed=0, max_bad=1.0, gpu=gpu, on_bad=lambda line: None
            ):
                seen.append(batch.batch)
        assert seen == [0, 1]


def test_what_is_handed_on_as_a_file(tmp_path: Path) -> None:
    save(tmp_path / "a.jpg", picture())
    data = (tmp_path / "a.jpg").read_bytes()
    assert decode_module.jpeg_or_pixels(data, 3) == Jpeg(data, 12, 20)
    assert isinstance(decode_module.jpeg_or_pixels(data + b"\0\0", 3), Jpeg)
    for cut in (data[:-2], data[: len(data) // 2], data[:20]):  # a whole file has its end
        with pytest.raises(ImageError):
            decode_module.jpeg_or_pixels(cut, 3)
    with pytest.raises(ImageError, match="empty"):
        decode_module.jpeg_or_pixels(b"", 3)


def test_a_file_that_nobody_can_decode_is_named(mixed: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_crops, "_decoded", lambda files, channels, device: [None] * len(files))
    assert all(map(same, load(mixed), load(mixed, gpu=CPU, encoded=True)))  # refused there, the CPU takes over

    def broken(data: bytes, channels: int) -> torch.Tensor:
        raise ImageError("cannot be decoded")

    monkeypatch.setattr(gpu_crops, "decode", broken)
    with pytest.raises(UserError, match=r"\.jpg: cannot be decoded. With --decode-on cpu such a file is skipped"):
        load(mixed, gpu=CPU, encoded=True)


def test_where_crops_are_made() -> None:
    for augment_on in ("auto", "cpu"):
        assert resolve_crop_device(augment_on, "cpu", CPU) is None
        with pytest.raises(UserError, match="--decode-on gpu"):
            resolve_crop_device(augment_on, "gpu", CPU)
    with pytest.raises(UserError, match="--augment-on gpu: the run trains on cpu; use --augment-on cpu or auto"):
        resolve_crop_device("gpu", "cpu", CPU)


def test_a_run_without_a_gpu_stops_before_anything_is_written(mixed: Source, tmp_path: Path) -> None:
    given = {"data": str(tmp_path), "augment_on": "gpu", "device": "cpu", "batch_size": 2, "out": str(tmp_path / "run")}
    with pytest.raises(UserError, match="--augment-on gpu: the run trains on cpu"):
        train(build_config(given))
    assert not (tmp_path / "run").exists()


def test_a_gpu_whose_kernels_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr("dino_fast.engine.build.cuda_unavailable_reason", lambda: "this build has no CUDA kernels")
    assert resolve_crop_device("auto", "cpu", gpu) is None
    with pytest.raises(UserError, match="--augment-on gpu: this build has no CUDA kernels"):
        resolve_crop_device("gpu", "cpu", gpu)
    monkeypatch.setattr("dino_fast.engine.build.cuda_unavailable_reason", lambda: None)
    assert resolve_crop_device("auto", "cpu", gpu) == resolve_crop_device("gpu", "cpu", gpu) == gpu
    assert resolve_crop_device("cpu", "cpu", gpu) is None
    with pytest.raises(UserError, match="--decode-on gpu: the crops are made on the CPU"):
        resolve_crop_device("cpu", "gpu", gpu)
    monkeypatch.setattr("dino_fast.engine.build.nvjpeg_unavailable_reason", lambda device: "no nvjpeg")
    with pytest.raises(UserError, match=r"--decode-on gpu: JPEGs cannot be decoded there \(no nvjpeg\)"):
        resolve_crop_device("auto", "gpu", gpu)


class FakeStream:
    """A stream that notes its order with others; `current` is the one that work is queued on."""

    current: FakeStream

    def __init__(self, name: str) -> None:
        self.name, self.waits, self.before = name, [], []

    def __enter__(self) -> None:
        self.before.append(FakeStream.current)
        FakeStream.current = self

    def __exit__(self, *error: object) -> None:
        FakeStream.current = self.before.pop()

    def record_event(self) -> SimpleNamespace:
        return SimpleNamespace(stream=self, query=lambda: False)

    def wait_event(self, event: SimpleNamespace) -> None:
        self.waits.append(event.stream)


def test_nvjpeg_writes_and_reads_in_order_with_the_crops(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's decoder waits for no stream: its images must lie in memory that no other work is queued on, and its
    files must stay until they are read."""
    crops, side = FakeStream("crops"), FakeStream("decode")
    FakeStream.current = crops
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream.current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(gpu_crops, "_reading", deque())
    gpu_crops._decode_stream.cache_clear()
    allocated_on, used_on = [], []

    def decode_jpegs(files: list, channels: int, device: torch.device) -> list:
        allocated_on.append(FakeStream.current)
        return [SimpleNamespace(record_stream=used_on.append) for _ in files]

    monkeypatch.setattr(gpu_crops, "decode_jpegs", decode_jpegs)
    files = [torch.zeros(4, dtype=torch.uint8)]
    try:
        for _ in range(2):
            assert len(gpu_crops._decoded(files, 3, torch.device("cuda:0"))) == 1
    finally:
        gpu_crops._decode_stream.cache_clear()
    assert allocated_on == [side, side] and used_on == [crops, crops] and FakeStream.current is crops
    assert crops.waits == [side, side]
    assert [kept[0] is files[0] for _, kept in gpu_crops._reading] == [True, True]
    for event, _ in gpu_crops._reading:
        event.query = lambda: True
    FakeStream.current = crops
    gpu_crops._decoded(files, 3, torch.device("cuda:0"))
    assert len(gpu_crops._reading) == 1  # the files that have been read are let go


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_crops_of_a_gpu_are_the_same(mixed: Source, workers: int) -> None:
    gpu = torch.device("cuda")
    for here, there in zip(load(mixed), load(mixed, workers=workers, gpu=gpu, pin_memory=True), strict=True):
        assert there.global_crops.is_cuda and torch.equal(here.global_crops, there.global_crops.cpu())
        assert torch.equal(here.local_crops, there.local_crops.cpu()) and torch.equal(here.index, there.index)


@pytest.mark.gpu
@needs_gpu
def test_nvjpeg_differs_by_rounding_only(mixed: Source) -> None:
    gpu = torch.device("cuda")
    if reason := gpu_crops.nvjpeg_unavailable_reason(gpu):
        pytest.skip(reason)
    for here, there in zip(load(mixed), load(mixed, gpu=gpu, encoded=True, pin_memory=True), strict=True):
        assert (here.global_crops - there.global_crops.cpu()).abs().mean() < 0.05
