"""Features and whitening against plain computations, matching by name, and distorted photographs of Caltech-101."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from dino_fast.cli import main as cli
from dino_fast.errors import UserError
from dino_fast.eval import copy
from dino_fast.eval.common.backbone import open_backbone


def test_the_feature_is_the_class_token_and_the_pooled_patches():
    tokens = torch.randn(3, 7, 5, dtype=torch.float64)
    rows = []
    for image in tokens.numpy():
        patches = np.maximum(image[1:], 1e-6) ** 4
        rows.append(np.concatenate((image[0], (patches.sum(axis=0) / 6) ** 0.25)))
    assert np.allclose(copy.copy_feature(tokens).numpy(), rows, atol=1e-6)


class PCA:
    """The original's (utils.PCA), which eval_copy_detection.py gives the covariance about zero of features as they
    are; their mean is subtracted before it is applied."""

    def __init__(self, features):
        self.mean = features.mean(axis=0)
        d, v = np.linalg.eigh(features.T @ features / len(features))
        d = np.maximum(d, d.max() * 1e-5)
        self.dvt = np.diag(d**-0.5) @ v.T

    def __call__(self, x):
        x = (x - self.mean) @ self.dvt.T
        return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("images", [500, 4])  # also fewer than there are dimensions
def test_whitening_is_the_originals(images):
    torch.manual_seed(0)
    basis, mean = torch.randn(9, 9).double(), 3 * torch.randn(9).double()
    x, queries = (torch.randn(n, 9).double() @ basis + mean for n in (images, 20))
    white, theirs = copy.whitening(x), PCA(x.numpy())
    ours, expected = (f(queries) @ f(x).T for f in (white, lambda y: torch.from_numpy(theirs(y.numpy()))))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9)
    assert torch.allclose(white(x).norm(dim=1), torch.ones(images).double())


def test_whitening_needs_different_images():
    x = torch.randn(4, 9)
    for few, message in ((x[:1], "from 1 image"), (x[:1].expand(3, -1), "the same feature")):
        with pytest.raises(UserError, match=message):
            copy.whitening(few)


def test_originals_after_the_first_twenty_places_do_not_count():
    database = torch.eye(30)
    query = torch.arange(30, 0, -1.0)[None]  # ranks the database in its order
    expected = {(0, 1): 1, (0, 20): 1 / 2, (19, 25): (0 / 19 + 1 / 20) / 2 / 2, (21, 29): 0}
    for places, value in expected.items():
        question = copy.Question(list(places), [], [])
        assert copy.scores(query, database, [question], ranked=20).item() == pytest.approx(value), places


def test_copies_are_matched_by_name():
    assert copy.match(["x/a.jpg", "b.png", "c.jpg"], ["b.jpg", "deep/a.png"]) == [[1], [0], []]
    assert copy.match(["200001.jpg", "200102.jpg"], ["200000.jpg", "200100.jpg"], r"(\d{4})\d\d") == [[0], [1]]
    for pattern, message in (
        ("(", "no regular expression"),
        ("abc", "no group"),
        ("(z)", "is nowhere in the name 'a'"),
    ):
        with pytest.raises(UserError, match=message):
            copy.match(["a"], ["a"], pattern)


def distorted(image, kind):
    if kind == "jpeg":
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=10)
        return Image.open(buffer).convert("RGB")
    if kind == "crop":  # 80 % of each side
        w, h = image.size
        return image.crop((w // 10, h // 10, w - w // 10, h - h // 10))
    return ImageEnhance.Contrast(image).enhance(0.6)


@pytest.fixture
def originals(tmp_path):
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 256, (5, 6, 3), dtype=np.uint8)
        (tmp_path / "originals").mkdir(exist_ok=True)
        Image.fromarray(pixels).resize((60, 50), Image.Resampling.BICUBIC).save(tmp_path / "originals" / f"{i}.png")
    return tmp_path / "originals"


def test_the_command(originals, checkpoint, tmp_path, capsys):
    copies = tmp_path / "copies"
    copies.mkdir()
    for path in sorted(originals.iterdir())[:5]:
        distorted(Image.open(path), "contrast").save(copies / path.name)
    Image.new("RGB", (40, 40)).save(copies / "stranger.png")
    words = ["eval", "copy", "--checkpoint", str(checkpoint), "--data", str(originals), "--image-size", "32"]
    assert cli.main([*words, "--test", str(copies), "--no-whitening", "--json", "--out", str(tmp_path / "out")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "out" / "copy.json").read_text())
    # By hand: the class token and pooled patches of each picture, their cosines, the place of the one right answer.
    frozen = open_backbone(checkpoint, device="cpu")

    def feature(path):
        pixels = np.asarray(Image.open(path).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)) / 255
        image = torch.from_numpy((pixels - 0.5) / 0.5).permute(2, 0, 1)[None].float()
        tokens = frozen.backbone.forward_features(image)[0].double().numpy()
        row = np.concatenate((tokens[0], np.mean(np.maximum(tokens[1:], 1e-6) ** 4, axis=0) ** 0.25))
        return row / np.linalg.norm(row)

    names = sorted(path.name for path in originals.iterdir())
    table = np.stack([feature(originals / name) for name in names])
    area = []
    for name in names[:5]:
        cosine = table @ feature(copies / name)
        rank = int((cosine > cosine[names.index(name)]).sum())
        area.append(((1 if rank == 0 else 0) + 1 / (rank + 1)) / 2)
    assert printed["map"] == pytest.approx(np.mean(area)) and printed["queries"] == 5
    assert printed["left_out"] == {"queries without an original": 1} and printed["whitened_on"] == 0
    more = ["--test", str(copies), "--distractors", str(copies / "stranger.png"), "--whiten", str(originals)]
    assert cli.main([*words, *more]) == 0
    output = capsys.readouterr().out
    assert "whitened on 12 images, 5 copies, 13 images" in output and "1 of queries without an original" in output
    assert cli.main(words) == 2
    assert "copy detection needs --test" in capsys.readouterr().err


def test_undistorted_copies_are_all_found(originals, checkpoint):
    for use in (True, False):
        result = copy.evaluate(checkpoint, originals, originals, image_size=32, use_whitening=use, device="cpu")
        assert (result["map"], result["first"], result["queries"]) == (1, 1, 12)


def test_copies_of_other_images(originals, checkpoint, tmp_path):
    (tmp_path / "copies").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "copies" / "x.png")
    with pytest.raises(UserError, match="copies are found by name"):
        copy.evaluate(checkpoint, originals, tmp_path / "copies")
    (tmp_path / "copies" / "3.png").write_bytes(b"oops")
    with pytest.raises(UserError, match=r"3\.png: not an image"):
        copy.evaluate(checkpoint, originals, tmp_path / "copies", image_size=32)


def test_caltech(caltech, checkpoint, tmp_path):
    # Random weights keep colours and layout. Expected for the photographs of six classes among 96: JPEG of quality 10
    # is found (1.00), a cut of a tenth at each border (0.57) and 60 % of the contrast (0.76) mostly; chance is 0.05.
    least = {"jpeg": 0.95, "crop": 0.5, "contrast": 0.65}
    data = caltech / "val"
    for kind, figure in least.items():
        for path in data.rglob("*.jpg"):
            target = tmp_path / kind / path.parent.name / f"{path.stem}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            distorted(Image.open(path).convert("RGB"), kind).save(target)
        result = copy.evaluate(
            checkpoint,
            data,
            tmp_path / kind,
            distractors=caltech / "train",
            pattern=r"(.*)\.",
            image_size=64,
            use_whitening=False,
            device="cpu",
        )
        assert result["queries"] > 40 and result["database"] == 48 + result["queries"]
        assert result["map"] >= figure
