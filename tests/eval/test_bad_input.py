"""What people give by mistake, through the command line: exit status 2, one clear sentence, and no traceback."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from dino_fast.cli.main import main


def pictures(folder, names, size=(32, 32)):
    folder.mkdir(parents=True)
    for i, name in enumerate(names):
        pixels = np.random.default_rng(i).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


@pytest.fixture
def two(tmp_path):
    """Two classes of four images."""
    for name in ("cats", "dogs"):
        pictures(tmp_path / "two" / name, [f"{i}.png" for i in range(4)])
    return tmp_path / "two"


def told(capsys, *words):
    assert main([str(word) for word in words]) == 2
    text = capsys.readouterr().err
    assert text.startswith("dino-fast: ") and "Traceback" not in text
    return text


@pytest.mark.parametrize("name", ["knn", "linear", "finetune"])
def test_labels(name, two, checkpoint, tmp_path, capsys):
    given = ("eval", name, "--checkpoint", checkpoint, "--device", "cpu", "--data")
    assert "has no labels, and this evaluation needs them" in told(capsys, *given, two / "cats")
    pictures(tmp_path / "other" / "birds", ["0.png"])
    assert "the test data has a class 'birds' that --data lacks" in told(
        capsys, *given, two, "--test", tmp_path / "other"
    )
    one = pictures(tmp_path / "one" / "cats", ["0.png", "1.png", "2.png"]).parent
    assert "are of one class ('cats'); give at least two" in told(capsys, *given, one, "--test", one)
    for path in sorted((one / "cats").iterdir())[1:]:
        path.unlink()
    assert "are of one class" in told(capsys, *given, one, "--test", one)


def test_k_beyond_the_bank(two, checkpoint, capsys):
    given = ("eval", "knn", "--checkpoint", checkpoint, "--device", "cpu", "--data", two, "--test", two)
    assert "k is 20 and the bank has 8 images; give a smaller --k" in told(capsys, *given)
    assert main([*map(str, given), "--k", "8"]) == 0


def test_one_image(checkpoint, tmp_path, capsys):
    alone = pictures(tmp_path / "alone", ["a.png"])
    out = tmp_path / "out"
    assert main(["eval", "attention", "--checkpoint", str(checkpoint), "--data", str(alone), "--out", str(out)]) == 0
    assert (out / "a" / "sheet.png").exists()
    capsys.readouterr()
    pictures(tmp_path / "one" / "cats", ["a.png"])
    text = told(capsys, "eval", "retrieval", "--checkpoint", checkpoint, "--data", tmp_path / "one", "--device", "cpu")
    assert "are of one class, so any ranking is right; give at least two" in text
    masks = tmp_path / "masks"
    masks.mkdir()
    mask = np.zeros((32, 32), dtype=np.uint8)
    mask[8:24, 8:24] = 1
    Image.fromarray(mask).save(masks / "a.png")
    segment = ("eval", "segment", "--checkpoint", checkpoint, "--data", alone, "--masks", masks, "--device", "cpu")
    assert main([*map(str, segment)]) == 0
    capsys.readouterr()
    Image.fromarray(mask[:16]).save(masks / "a.png")
    assert "a.png is 32x16 pixels, its image" in told(capsys, *segment)


def test_a_video_that_ends_early(checkpoint, tmp_path, capsys):
    names = [f"{i:05d}.png" for i in range(4)]
    frames = pictures(tmp_path / "JPEGImages" / "480p" / "walk", names, (64, 40))
    masks = tmp_path / "Annotations" / "480p" / "walk"
    masks.mkdir(parents=True)
    for name in names:
        mask = np.zeros((40, 64), dtype=np.uint8)
        mask[8:32, 8:40] = 1
        Image.fromarray(mask).save(masks / name)
    (frames / "00003.png").unlink()
    given = ("eval", "video", "--checkpoint", checkpoint, "--data", tmp_path, "--device", "cpu", "--image-size", 40)
    text = told(capsys, *given)
    assert "3 frames and 4 masks" in text and "00003" in text and "end early" in text
    shutil.copy(masks / "00002.png", frames / "00003.png")
    Image.fromarray(np.zeros((20, 64), dtype=np.uint8)).save(masks / "00002.png")
    assert "00002.png is 64x20, the first one 64x40" in told(capsys, *given)


def test_checkpoints_of_other_libraries(two, tmp_path, capsys):
    """Each is named for what it lacks, never loaded in part."""
    torch.manual_seed(0)
    swin = {"layers.0.blocks.0.attn.qkv.weight": torch.zeros(12, 4), "patch_embed.proj.weight": torch.zeros(4, 3, 4, 4)}
    torch.save({"model": swin}, tmp_path / "mae.pth")
    torch.save(swin, tmp_path / "swin.pth")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    bert = transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=30))
    bert.save_pretrained(tmp_path / "bert")
    capsys.readouterr()
    (tmp_path / "empty").mkdir()
    given = ("eval", "knn", "--data", two, "--test", two, "--k", 1, "--device", "cpu", "--checkpoint")
    for name, message in (
        ("mae.pth", "not a vision transformer as DINO names it: it lacks"),
        ("swin.pth", "not a vision transformer as DINO names it: it lacks"),
        ("module.pth", "could run code"),
        ("bert", "not a vision transformer as DINO names it"),
        ("empty", "no complete checkpoint"),
        ("none.pth", "does not exist; give a run directory"),
    ):
        assert message in told(capsys, *given, tmp_path / name), name
