"""Python objects as sources: arrays, `datasets` objects, dictionaries of parts; patterns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as arrow
import pytest
import torch

from dino_fast.augment import MultiCrop
from dino_fast.data import ArraySource, ImageError, held_out, open_source, train_loader
from dino_fast.errors import UserError

from .test_sources import png, save

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("shape", "want"), [((5, 8, 9), (1, 8, 9)), ((5, 8, 9, 3), (3, 8, 9)), ((5, 1, 8, 9), (1, 8, 9)),
                        ((5, 8, 9, 1), (1, 8, 9)), ((5, 3, 8, 9), (3, 8, 9))],
)  # fmt: skip
@pytest.mark.parametrize("torch_tensor", [False, True])
def test_arrays(shape: tuple[int, ...], want: tuple[int, ...], torch_tensor: bool) -> None:
    images = RNG.integers(0, 256, shape, dtype=np.uint8)
    given = torch.from_numpy(images) if torch_tensor else images
    source = open_source(given)
    assert len(source) == 5 and source.read(2).shape == want and source.labels is None
    flat = images[2].reshape(8, 9, -1) if shape[-1] != 9 else images[2].reshape(-1, 8, 9).transpose(1, 2, 0)
    assert np.array_equal(source.read(2).permute(1, 2, 0), flat)
    assert open_source((given, [4, 3, 2, 1, 0])).label(1) == 3
    assert open_source(source) is source


def test_arrays_of_numpy_on_disk(tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    np.save(tmp_path / "x.npy", images)
    source = open_source(tmp_path / "x.npy")
    assert np.array_equal(source.read(19).permute(1, 2, 0), images[19])
    (batch,) = train_loader(source, MultiCrop(8, 4, 1), batch_size=20, seed=0, epochs=1, workers=1)
    assert sorted(batch.index.tolist()) == list(range(20))
    (tmp_path / "y.npy").write_bytes(b"no array")
    with pytest.raises(UserError, match=r"y\.npy: not a readable array"):
        open_source(tmp_path / "y.npy")
    np.save(tmp_path / "z.npy", images.astype(np.float32))
    with pytest.raises(UserError, match="uint8"):
        open_source(tmp_path / "z.npy")


def test_what_cannot_be_opened_is_said() -> None:
    with pytest.raises(UserError, match="cannot open a list; give a path"):
        open_source([1, 2])
    with pytest.raises(UserError, match="which is the channel"):
        open_source(np.zeros((2, 3, 3, 3), np.uint8))
    with pytest.raises(UserError, match="uint8"):
        open_source(np.zeros((2, 3), np.uint8))


class Rows:
    """The part of `datasets.Dataset` that is used, over an Arrow table."""

    def __init__(self, table: arrow.Table, names: list[str] | None = None) -> None:
        self.table, self.names = table, names
        self.column_names = table.column_names
        self.features = {"label": type("ClassLabel", (), {"names": names})()}

    def __len__(self) -> int:
        return self.table.num_rows

    def select_columns(self, names: list[str]) -> Rows:
        return Rows(self.table.select(names), self.names)

    def with_format(self, kind: str) -> Rows:
        assert kind == "arrow"
        return self

    def __getitem__(self, place: int | slice) -> arrow.Table:
        return self.table[place] if isinstance(place, slice) else self.table.slice(place, 1)


def test_rows_of_datasets(tmp_path: Path) -> None:
    save(tmp_path / "side.png")
    kind = arrow.struct({"bytes": arrow.binary(), "path": arrow.string()})
    rows = [{"bytes": png(10), "path": "x"}, {"bytes": None, "path": str(tmp_path / "side.png")}, None,
            {"bytes": None, "path": str(tmp_path / "gone.png")}]  # fmt: skip
    table = arrow.table({"image": arrow.array(rows, kind), "label": [1, 0, None, 1]})
    source = open_source(Rows(table, ["no", "yes"]))
    assert source.classes == ["no", "yes"] and source.labels.tolist() == [1, 0, -1, 1]
    assert source.read(0).unique().tolist() == [10] and source.read(1).shape == (3, 12, 20)
    with pytest.raises(ImageError, match="dataset, row 2: the image is null"):
        source.read(2)
    with pytest.raises(ImageError, match=r"dataset, row 3: .*gone\.png: No such file"):
        source.read(3)
    with pytest.raises(UserError, match="columns text; expected 'image'"):
        open_source(Rows(arrow.table({"text": ["a"]})))
    parts = open_source({"train": Rows(table), "test": Rows(table.slice(0, 1))})
    assert len(parts) == 4 and len(held_out(parts)) == 1


def test_the_library_datasets_itself(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the library datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = {"image": [{"bytes": png(i), "path": None} for i in range(12)], "label": [i % 2 for i in range(12)]}
    dataset = datasets.Dataset.from_dict(rows, features=features)
    source = open_source(dataset.shuffle(seed=1).select(range(10)))
    order = [int(source.read(i).unique().item()) for i in range(10)]
    assert len(set(order)) == 10 and source.labels.tolist() == [i % 2 for i in order] and source.classes[1] == "yes"
    (batch,) = train_loader(source, MultiCrop(8, 4, 1), batch_size=10, seed=0, epochs=1, workers=1)
    assert len(batch.index) == 10
    datasets.DatasetDict({"train": dataset, "test": dataset.select([3])}).save_to_disk(str(tmp_path / "kept"))
    kept = open_source(tmp_path / "kept")
    assert len(kept) == 12 and held_out(kept).read(0).unique().tolist() == [3]


def test_patterns(tmp_path: Path) -> None:
    for name in ("a/1.png", "a/2.png", "b/3.png", "b/c/4.png", "b/notes.txt"):
        save(tmp_path / name) if name.endswith("png") else (tmp_path / name).write_text("x")
    for pattern, count in (("*/*.png", 3), ("**/*.png", 4), ("{a,b}/[13].png", 2), ("a/{1..2}.png", 2)):
        source = open_source(f"{tmp_path}/{pattern}")
        assert len(source) == count and source.labels is None and source.read(0).shape == (3, 12, 20)
    with pytest.raises(UserError, match=r"\*\.gif matches no file"):
        open_source(f"{tmp_path}/*.gif")
    with pytest.raises(UserError, match=r"has files of \.png, \.txt; expected images"):
        open_source(f"{tmp_path}/b/*")
    strange = save(tmp_path / "[x]" / "1.png").parent
    assert len(open_source(strange)) == 1  # what exists is no pattern
    assert isinstance(open_source("demo"), ArraySource)
