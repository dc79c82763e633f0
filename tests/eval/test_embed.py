"""`dino-fast embed`: a row an image, whatever happened to it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image

import dino_fast
from dino_fast.cli import main as cli
from dino_fast.errors import UserError
from dino_fast.eval import embed as module
from dino_fast.eval.embed import Embeddings, embed, write_embeddings

RNG = np.random.default_rng(0)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve images of several sizes in two classes, two of them broken."""
    root = tmp_path / "photos"
    for i in range(12):
        file = root / ("cat" if i < 5 else "dog") / f"{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RNG.integers(0, 256, (30 + i, 50 - i, 3), dtype=np.uint8)).save(file)
        if i in (3, 11):
            file.write_bytes(file.read_bytes()[:90])
    return root


@pytest.mark.parametrize("ending", [".parquet", ".npy", ".csv"])
@pytest.mark.parametrize("features", ["cls", "mean", "patches"])
def test_every_file_has_a_row(photos: Path, checkpoint: Path, tmp_path: Path, ending: str, features: str) -> None:
    out = tmp_path / f"features{ending}"
    if (features, ending) == ("patches", ".csv"):
        with pytest.raises(UserError, match=r"do not fit into a \.csv"):
            embed(photos, checkpoint, out, features=features)
        return
    found = embed(photos, checkpoint, out, features=features, device="cpu", batch_size=5)
    shape = (16, 16) if features == "patches" else (16,)
    assert found.features.shape == (12, *shape) and found.features.dtype == np.float32
    assert [Path(path).stem for path in found.paths] == [f"{i:02d}" for i in range(12)]
    assert found.labels == ["cat"] * 5 + ["dog"] * 7
    assert sorted(found.errors) == [3, 11] and "03.png: " in found.errors[3]
    assert np.isnan(found.features[[3, 11]]).all() and np.isfinite(np.delete(found.features, [3, 11], 0)).all()
    backbone = dino_fast.load(checkpoint, device="cpu")
    whole = [path for i, path in enumerate(found.paths) if i not in found.errors]
    assert np.allclose(found.readable().features, backbone(whole, features=features), atol=1e-6)
    assert len(found.readable()) == 10 and found.readable().paths == whole
    memory = embed(photos, checkpoint, features=features, device="cpu")
    assert np.allclose(memory.features, found.features, atol=1e-6, equal_nan=True)
    assert (memory.paths, memory.labels, memory.errors) == (found.paths, found.labels, found.errors)
    assert sorted(p.name for p in tmp_path.glob("features*")) == sorted(
        [out.name] + (["features.rows.csv"] if ending == ".npy" else [])
    )


def test_the_columns_of_parquet(photos: Path, checkpoint: Path, tmp_path: Path) -> None:
    embed(photos, checkpoint, tmp_path / "x.parquet", device="cpu")
    table = parquet.read_table(tmp_path / "x.parquet")
    assert table.column_names == ["path", "label", "feature", "error"]
    assert str(table.schema.field("feature").type).startswith("fixed_size_list") and table["feature"].null_count == 2


def test_an_interrupted_call_is_continued(photos: Path, checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "_ROWS", 4)
    expected = embed(photos, checkpoint, device="cpu")
    out, asked = tmp_path / "x.parquet", []
    original = module.centered_images

    def stopped(source, size, start=0):
        for place, image in enumerate(original(source, size, start), start):
            asked.append(place)
            if place == 9:
                raise KeyboardInterrupt
            yield image

    monkeypatch.setattr(module, "centered_images", stopped)
    with pytest.raises(KeyboardInterrupt, match="after 8 of 12 images; the same command continues"):
        write_embeddings(photos, checkpoint, out, device="cpu")
    assert not out.exists() and (tmp_path / "x.parquet.parts").is_dir()
    with pytest.raises(UserError, match="other images, weights or options; delete it"):
        write_embeddings(photos, checkpoint, out, device="cpu", features="mean")
    monkeypatch.setattr(module, "centered_images", original)
    asked.clear()
    assert write_embeddings(photos, checkpoint, out, device="cpu")["continued"] == 8
    found = Embeddings.read(out)
    assert np.array_equal(found.features, expected.features, equal_nan=True) and found.errors == expected.errors
    assert not (tmp_path / "x.parquet.parts").exists()
    with pytest.raises(UserError, match="exists; give another name"):
        write_embeddings(photos, checkpoint, out)


def test_the_command_counts_what_could_not_be_read(photos, checkpoint, tmp_path: Path, capsys) -> None:
    words = ["embed", "--checkpoint", str(checkpoint), "--data", str(photos), "--device", "cpu"]
    assert cli.main([*words, "--out", str(tmp_path / "a.npy")]) == 0
    output = capsys.readouterr().out
    assert "wrote 16 features (cls) of 12 images" in output and "2 could not be read" in output
    assert cli.main([*words, "--out", str(tmp_path / "b.csv"), "--json", "--features", "mean"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 12
    for wrong, message in (
        (["--out", str(tmp_path / "x.txt")], "must end in .parquet, .npy, .csv"),
        (["--out", str(tmp_path / "x.npy"), "--batch-size", "0"], "--batch-size is 0"),
        (["--out", str(tmp_path / "x.npy"), "--image-size", "30"], "--image-size 30 is not a multiple"),
    ):
        assert cli.main([*words, *wrong]) == 2
        assert message in capsys.readouterr().err


def test_both_parts_of_a_set_are_embedded(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("train/a/1.png", "train/b/2.png", "val/b/3.png", "val/c/4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (len(name), 9, 9)).save(tmp_path / name)
    found = embed(tmp_path, checkpoint, device="cpu")
    assert [Path(path).name for path in found.paths] == ["1.png", "2.png", "3.png", "4.png"]
    assert found.labels == ["a", "b", "b", "c"]


def test_images_without_labels_and_none_that_can_be_read(checkpoint: Path, tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    found = embed(images, checkpoint, tmp_path / "x.csv", device="cpu")
    assert found.labels == [None] * 3 and found.paths[1] == "array, image 1"
    assert embed((images, [5, 6, 7]), checkpoint, tmp_path / "y.npy", device="cpu").labels == [5, 6, 7]
    assert embed(Image.fromarray(images[0]), checkpoint, device="cpu").features.shape == (1, 16)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "1.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match="none of the 1 images can be read"):
        embed(tmp_path / "bad", checkpoint, tmp_path / "z.npy", device="cpu")
    assert not (tmp_path / "z.npy").exists()
    with pytest.raises(UserError, match="no file of 'dino-fast embed'"):
        Embeddings.read(tmp_path / "none.parquet")


def test_a_backbone_that_diverged_is_told(checkpoint: Path) -> None:
    backbone = dino_fast.load(checkpoint, device="cpu")
    with torch.no_grad():
        backbone.backbone.norm.bias.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        embed(RNG.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8), backbone)
