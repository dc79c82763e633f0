"""A tiny random backbone in a file, and the real data where it is."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest
import torch

from dino_fast.models import VisionTransformer
from dino_fast.models.weights.read import export_backbone

DATA = Path(os.environ.get("DINO_FAST_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data"))


def data_file(name: str) -> Path:
    """The file of the real data, or a skip that says where it was looked for."""
    if not (DATA / name).is_file():
        pytest.skip(f"needs {name} in {DATA} (DINO_FAST_TEST_DATA names another folder)")
    return DATA / name


def unpack(name: str, folder: Path, wanted) -> Path:
    """The members of a tar of the real data for which `wanted(name)` is true, below `folder`."""
    with tarfile.open(data_file(name)) as archive:
        members = [member for member in archive.getmembers() if member.isfile() and wanted(member.name)]
        safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # from Python 3.11.4 and 3.10.12
        archive.extractall(folder, members, **safely)
    return folder / name.removesuffix(".tar")


@pytest.fixture(scope="session")
def cifar(tmp_path_factory):
    """The first 500 test images of CIFAR-10 to learn from (train.parquet), the next 250 to classify (test.parquet)."""
    import pyarrow.parquet as parquet

    table = parquet.read_table(data_file("cifar10-test.parquet"))
    folder = tmp_path_factory.mktemp("cifar")
    parquet.write_table(table.slice(0, 500), folder / "train.parquet")
    parquet.write_table(table.slice(500, 250), folder / "test.parquet")
    return folder


@pytest.fixture(scope="session")
def davis(tmp_path_factory):
    """The first eight frames of every DAVIS sequence, with their masks."""
    folder = tmp_path_factory.mktemp("davis")
    return unpack("davis-sample.tar", folder, lambda name: int(Path(name).stem) < 8)


@pytest.fixture(scope="session")
def caltech(tmp_path_factory):
    """Eight training and all validation photographs of six classes of Caltech-101."""
    chosen = {"Motorbikes", "airplanes", "butterfly", "lotus", "panda", "watch"}
    kept: dict[str, int] = {}

    def wanted(name: str) -> bool:
        part, folder = Path(name).parts[1:3]
        kept[f"{part}/{folder}"] = kept.get(f"{part}/{folder}", 0) + 1
        return folder in chosen and (part == "val" or kept[f"{part}/{folder}"] <= 8)

    return unpack("caltech101.tar", tmp_path_factory.mktemp("caltech"), wanted)


@pytest.fixture
def tiny():
    """Patches of 8, two blocks, two heads, for images of 32 x 32, in evaluation mode."""
    torch.manual_seed(0)
    return VisionTransformer(32, 8, embed_dim=16, depth=2, num_heads=2).eval()


@pytest.fixture
def checkpoint(tiny, tmp_path):
    return export_backbone(tiny, tmp_path / "tiny.safetensors", mean=[0.5] * 3, std=[0.5] * 3)
