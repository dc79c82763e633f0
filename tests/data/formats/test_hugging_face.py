"""Objects of the library `datasets`, and folders that it saved."""

from __future__ import annotations

from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet
import pytest

from dino_fast.augment import MultiCrop
from dino_fast.data import ImageError, open_source, train_loader
from dino_fast.errors import UserError

from ..example_files import png, save


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
    assert len(parts) == 4 and len(parts.test) == 1


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
    assert len(kept) == 12 and kept.test.read(0).unique().tolist() == [3]
