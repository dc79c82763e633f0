"""Average precision against walking down the ranking, features against a plain computation, and Caltech-101."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from dino_fast.cli import main as cli
from dino_fast.errors import UserError
from dino_fast.eval import retrieval
from dino_fast.eval.common.backbone import open_backbone
from dino_fast.eval.common.frames import read_image


def walked(similarity, relevant, ignored):
    """One ranking, image by image: the area under precision over recall, by trapezoids."""
    total, found, rank = sum(r and not i for r, i in zip(relevant, ignored, strict=True)), 0, 0
    area = 0.0
    for n in np.argsort(-np.asarray(similarity), kind="stable"):
        if ignored[n]:
            continue
        if relevant[n]:
            before = 1.0 if rank == 0 else found / rank
            found += 1
            area += (before + found / (rank + 1)) / 2 / total
        rank += 1
    return area if total else math.nan


def test_average_precision_equals_walking_down_the_ranking():
    rng = np.random.default_rng(0)
    similarity = rng.integers(0, 12, (30, 40)) / 12  # with ties
    relevant, ignored = rng.random((30, 40)) < 0.2, rng.random((30, 40)) < 0.1
    relevant[3] = False
    got = retrieval.average_precision(*map(torch.from_numpy, (similarity, relevant, ignored)))
    expected = [walked(*row) for row in zip(similarity, relevant, ignored, strict=True)]
    assert got.tolist() == pytest.approx(expected, abs=1e-12, nan_ok=True)
    assert math.isnan(expected[3])


def test_simple_rankings():
    similarity = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    assert retrieval.average_precision(similarity, torch.tensor([[True, True, False, False]])).item() == 1
    last = retrieval.average_precision(similarity, torch.tensor([[False, False, False, True]])).item()
    assert last == pytest.approx((0 / 3 + 1 / 4) / 2)


def test_medium_and_hard():
    queries, database = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.9, 0], [0.8, 0], [0.7, 0], [0.6, 0], [0.5, 0]])
    question = [retrieval.Question(easy=[0], hard=[3], junk=[1])]
    medium = walked([5, 4, 3, 2, 1], [1, 0, 0, 1, 0], [0, 1, 0, 0, 0])
    hard = walked([5, 4, 3, 2, 1], [0, 0, 0, 1, 0], [1, 1, 0, 0, 0])
    assert retrieval.scores(queries, database, question).item() == pytest.approx(medium)
    assert retrieval.scores(queries, database, question, hard=True).item() == pytest.approx(hard)


def test_the_feature_is_the_mean_class_token_over_three_sizes(checkpoint):
    frozen = open_backbone(checkpoint, device="cpu")
    image = torch.randint(0, 256, (3, 60, 100), generator=torch.Generator().manual_seed(0)).byte()
    small = Image.fromarray(image.permute(1, 2, 0).numpy())
    small.thumbnail((64, 64), Image.Resampling.LANCZOS)  # 38 x 64
    pixels = (torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1)[None] / 255 - 0.5) / 0.5
    total = torch.zeros(16)
    # The original scales by 1, 0.707 (26.9 x 45.3) and 0.5, and its convolution leaves out what is no whole patch of 8.
    for scale, whole in ((1, (32, 64)), (2**-0.5, (24, 40)), (0.5, (16, 32))):
        resized = torch.nn.functional.interpolate(pixels, scale_factor=scale, mode="bilinear", align_corners=False)
        total += frozen.backbone(resized[:, :, : whole[0], : whole[1]])[0]
    expected = total / total.norm()
    torch.testing.assert_close(retrieval.multi_scale_feature(frozen, image, 64), expected, rtol=1e-4, atol=1e-5)


def saved(path, seed, size=(30, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[0] // 10, size[1] // 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC).save(path)


@pytest.fixture
def buildings(tmp_path):
    for i in range(6):
        saved(tmp_path / "all" / ("church" if i < 3 else "tower") / f"{i}.png", i)
    for i in range(3):
        saved(tmp_path / "queries" / ("church", "tower", "bridge")[i] / f"q{i}.png", 10 + i)
    return tmp_path


def by_hand(checkpoint, database, queries, relevant, ignored):
    frozen = open_backbone(checkpoint, device="cpu")
    table = [[retrieval.multi_scale_feature(frozen, read_image(p), 64) for p in paths] for paths in (database, queries)]
    similarity = torch.stack(table[1]) @ torch.stack(table[0]).T
    return [walked(s, r, i) for s, r, i in zip(similarity.tolist(), relevant, ignored, strict=True)]


def test_the_command_with_classes(buildings, checkpoint, capsys):
    words = ["eval", "retrieval", "--checkpoint", str(checkpoint), "--data", str(buildings / "all")]
    words += ["--image-size", "64"]
    assert cli.main([*words, "--test", str(buildings / "queries"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    database = [buildings / "all" / ("church" if i < 3 else "tower") / f"{i}.png" for i in range(6)]
    queries = [buildings / "queries" / "church" / "q0.png", buildings / "queries" / "tower" / "q1.png"]
    relevant = [[True] * 3 + [False] * 3, [False] * 3 + [True] * 3]
    expected = by_hand(checkpoint, database, queries, relevant, [[False] * 6] * 2)
    assert printed["map"] == pytest.approx(np.mean(expected))
    assert printed["queries"] == 2 and printed["left_out"] == {"queries with nothing to find": 1}  # the bridge
    assert cli.main(words) == 0  # each image searches the others
    same = [[j != i and (i < 3) == (j < 3) for j in range(6)] for i in range(6)]
    expected = by_hand(checkpoint, database, database, same, np.eye(6, dtype=bool).tolist())
    assert f"mAP {100 * np.mean(expected):.2f} %" in capsys.readouterr().out


def test_ground_truth(buildings, checkpoint, capsys):
    rows = [
        {
            "query": "church/q0",
            "easy": ["church/0"],
            "hard": ["church/1"],
            "junk": ["tower/5"],
            "box": [2, 0, 30.4, 20],
        },
        {"query": "tower/q1", "easy": ["tower/3", "tower/4"]},
    ]
    truth = buildings / "truth.json"

    def command(*more):
        truth.write_text(json.dumps(rows))
        words = ["--data", str(buildings / "all"), "--test", str(buildings / "queries"), "--ground-truth", str(truth)]
        code = cli.main(["eval", "retrieval", "--checkpoint", str(checkpoint), "--image-size", "64", *words, *more])
        return code, capsys.readouterr()

    code, output = command("--json")
    printed = json.loads(output.out)
    database = [buildings / "all" / ("church" if i < 3 else "tower") / f"{i}.png" for i in range(6)]
    pixels = np.asarray(Image.open(buildings / "queries" / "church" / "q0.png"))[:20, 2:30]
    Image.fromarray(pixels).save(buildings / "cut.png")
    queries = [buildings / "cut.png", buildings / "queries" / "tower" / "q1.png"]
    relevant = [[1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 0]]
    expected = by_hand(checkpoint, database, queries, relevant, [[0] * 5 + [1], [0] * 6])
    assert code == 0 and printed["map"] == pytest.approx(np.mean(expected))
    hard = by_hand(checkpoint, database, queries[:1], [[0, 1, 0, 0, 0, 0]], [[1, 0, 0, 0, 0, 1]])
    assert printed["map_hard"] == pytest.approx(hard[0])
    assert "hard" in command()[1].out
    for change, message in [
        ({"query": "church/q9"}, "did you mean 'church/q0'"),
        ({"easy": ["church/9"]}, "'church/9' (easy for 'church/q0') is not in"),
        ({"box": [1, 2, 3]}, "left, top, right, bottom"),
        ({"box": [50, 0, 60, 9]}, "holds no pixel"),
    ]:
        kept = dict(rows[0])
        rows[0] |= change
        code, output = command()
        assert code == 2 and message in output.err
        rows[0] = kept
    rows[:] = [{"name": "church/q0"}]
    assert "must be a list of objects" in command()[1].err


def test_labels_that_are_missing_or_of_another_set(buildings, checkpoint):
    saved(buildings / "other" / "a" / "1.png", 1)
    cases = [
        (buildings / "all" / "church", None, "has no labels"),
        (buildings / "all", buildings / "queries" / "church", "has no labels"),
        (buildings / "all", buildings / "other", "labels belong to another set"),
        (buildings / "other", buildings / "other", "of one class"),
    ]
    for data, test, message in cases:
        with pytest.raises(UserError, match=message):
            retrieval.evaluate(checkpoint, data, test, image_size=32)
    (buildings / "all" / "church" / "broken.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"broken\.png"):
        retrieval.evaluate(checkpoint, buildings / "all", image_size=32)


def test_caltech(caltech, checkpoint, tmp_path):
    classes = retrieval.evaluate(checkpoint, caltech, image_size=64, device="cpu")
    assert (classes["database"], classes["queries"]) == (48, len(list((caltech / "val").rglob("*.jpg"))))
    assert 1 / 6 < classes["map"] < 0.9  # a random order gives about one sixth; random weights see colour and layout
    # Photographs distorted mildly are found by any network: blurred and saved as JPEG of quality 20, at least 0.9.
    for path in sorted((caltech / "val").rglob("*.jpg")):
        name = f"{path.parent.name}-{path.stem}"
        image = Image.open(path).convert("RGB")
        for folder, copy in (("all", image), ("copies", image.filter(ImageFilter.GaussianBlur(1)))):
            (tmp_path / folder / name).mkdir(parents=True)
            copy.save(tmp_path / folder / name / "a.jpg", quality=95 if folder == "all" else 20)
    same = retrieval.evaluate(checkpoint, tmp_path / "all", tmp_path / "copies", image_size=64, device="cpu")
    assert same["map"] > 0.9
