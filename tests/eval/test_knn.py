"""k-NN against a small independent computation, and the command on the demo data."""

from __future__ import annotations

import argparse
import json

import numpy as np
import pytest
import torch
from PIL import Image

from dino_fast.commands import eval_knn
from dino_fast.errors import UserError
from dino_fast.eval import knn
from dino_fast.models import VisionTransformer
from dino_fast.models.checkpoints import export_backbone


def by_hand(bank, bank_labels, queries, query_labels, k, temperature, classes):
    """Votes one query at a time in float64."""
    first = five = 0
    bank = bank / np.linalg.norm(bank, axis=1, keepdims=True)
    for query, label in zip(queries, query_labels, strict=True):
        similarity = bank @ (query / np.linalg.norm(query))
        votes = np.zeros(classes)
        for i in np.argsort(-similarity)[:k]:
            votes[bank_labels[i]] += np.exp(similarity[i] / temperature)
        order = np.argsort(-votes, kind="stable")
        first += order[0] == label
        five += label in order[:5]
    return first / len(queries), five / len(queries)


@pytest.mark.parametrize("n,m,classes,k", [(200, 37, 12, 20), (50, 1, 3, 50), (300, 150, 40, 1), (9, 5, 7, 4)])
@pytest.mark.parametrize("chunk", [1 << 24, 700])
def test_accuracy_equals_a_computation_by_hand(n, m, classes, k, chunk, monkeypatch):
    monkeypatch.setattr(knn, "_SIMILARITIES", chunk)
    rng = np.random.default_rng(n)
    bank, queries = rng.standard_normal((n, 6)), rng.standard_normal((m, 6))
    labels, query_labels = rng.integers(0, classes, n), rng.integers(0, classes, m)
    got = knn.knn_accuracy(*map(torch.from_numpy, (bank, labels, queries, query_labels)), k=k, num_classes=classes)
    assert got == pytest.approx(by_hand(bank, labels, queries, query_labels, k, 0.07, classes), abs=1e-12)


def test_few_classes_and_a_low_temperature():
    bank, labels = torch.eye(3), torch.tensor([0, 1, 1])
    assert knn.knn_accuracy(bank, labels, bank, torch.tensor([0, 1, 0]), k=3, temperature=1e-4) == (2 / 3, 1.0)


@pytest.mark.parametrize(
    "options,message",
    [({"k": 4}, "the bank has 3"), ({"k": 0}, "from 1 to 3"), ({"k": 1, "temperature": 0.0}, "temperature")],
)
def test_bad_settings(options, message):
    with pytest.raises(UserError, match=message):
        knn.knn_accuracy(torch.eye(3), torch.arange(3), torch.eye(3), torch.arange(3), **options)


def test_features_keep_the_mode_and_must_be_finite():
    model = VisionTransformer(16, 8, embed_dim=16, depth=1, num_heads=2, drop_path_rate=0.5)
    images = torch.randn(5, 3, 16, 16)
    features, labels = knn.extract_features(model, [(images[:3], torch.arange(3)), (images[3:], torch.arange(2))])
    assert features.shape == (5, 16) and labels.tolist() == [0, 1, 2, 0, 1] and model.training
    torch.testing.assert_close(features, model.eval()(images))
    with pytest.raises(UserError, match="not finite"):
        knn.extract_features(model, [(images * torch.nan, torch.arange(5))])


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    model = VisionTransformer(16, 8, embed_dim=16, depth=1, num_heads=2)
    return export_backbone(model, tmp_path / "model.safetensors", mean=[0.5] * 3, std=[0.5] * 3)


def folder(root, classes, count):
    """One colour a class, nearly."""
    rng = np.random.default_rng(len(classes))
    for name, colour in classes.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.clip(np.array(colour) + rng.integers(-9, 9, (20, 24, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def test_the_command_matches_classes_by_name(tmp_path, checkpoint, capsys):
    colours = {"blue": (9, 9, 200), "green": (9, 200, 9), "red": (200, 9, 9)}
    data = folder(tmp_path / "train", colours, 6)
    test = folder(tmp_path / "queries", {name: colours[name] for name in ("green", "red")}, 3)
    parser = argparse.ArgumentParser()
    eval_knn.add_arguments(parser)
    given = ["--checkpoint", str(checkpoint), "--data", str(data), "--test", str(test), "--k", "5"]
    assert eval_knn.run(parser.parse_args([*given, "--json", "--out", str(tmp_path / "out")])) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "out" / "knn.json").read_text())
    assert (printed["top1"], printed["top5"], printed["bank"], printed["queries"], printed["k"]) == (1, 1, 18, 6, 5)
    assert eval_knn.run(parser.parse_args(given)) == 0
    assert "k=5, T=0.07, teacher class token [16], bank of 18 images, 6 queries" in capsys.readouterr().out


def test_data_without_labels_or_with_other_classes(tmp_path, checkpoint):
    data = folder(tmp_path / "data", {"red": (200, 9, 9), "blue": (9, 9, 200)}, 4)
    with pytest.raises(UserError, match="no labels"):
        knn.evaluate(checkpoint, data / "red", k=1)
    other = folder(tmp_path / "other", {"reds": (200, 9, 9), "blue": (9, 9, 200)}, 1)
    with pytest.raises(UserError, match=r"class 'reds'.*did you mean 'red'"):
        knn.evaluate(checkpoint, data, other, k=1)
