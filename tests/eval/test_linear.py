"""The grid of linear layers against torch's own SGD, and the command on real images."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torchvision.transforms import Compose, RandomHorizontalFlip, RandomResizedCrop

from dino_fast.cli import main as cli
from dino_fast.data import eval_batches, open_source
from dino_fast.errors import UserError
from dino_fast.eval import linear
from dino_fast.eval.common.backbone import tokens_feature
from dino_fast.eval.common.crops import random_batches, random_crop
from dino_fast.seeding import derive_seed


def by_torch(x, y, classes, rate, epochs, batch_size, seed):
    """One layer at one learning rate, with autograd, torch.optim.SGD and its cosine schedule."""
    layer = nn.Linear(x.shape[1], classes)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(x.shape[1], classes, generator=torch.Generator().manual_seed(seed)).T * 0.01)
        layer.bias.zero_()
    optimizer = torch.optim.SGD(layer.parameters(), lr=rate * batch_size / 256, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, eta_min=0)
    for epoch in range(epochs):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(derive_seed(seed, 3, epoch)))
        for index in order.split(batch_size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(layer(x[index]), y[index]).backward()
            optimizer.step()
        schedule.step()
    return layer


def test_every_rate_of_the_grid_is_trained_as_if_alone():
    torch.manual_seed(1)
    x, y = torch.randn(150, 12), torch.randint(0, 7, (150,))
    rates = [0.003, 0.03, 0.3]
    heads = linear.fit(lambda epoch: (x, y), 7, rates, epochs=5, batch_size=64, seed=3)
    shares = linear.accuracy(heads, x, y)
    for i, rate in enumerate(rates):
        alone = by_torch(x, y, 7, rate, 5, 64, 3)
        weight, bias = heads.layer(i)
        torch.testing.assert_close(weight, alone.weight.data, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(bias, alone.bias.data, rtol=1e-5, atol=1e-6)
        best = alone(x).topk(5, dim=1).indices == y[:, None]
        assert shares[i] == pytest.approx((best[:, 0].float().mean().item(), best.any(1).float().mean().item()))


def test_features_are_the_blocks_class_tokens_and_the_mean_patch(tiny):
    images = torch.randn(3, 3, 32, 32)
    feature, name = tokens_feature(tiny, 2, patch_mean=True)
    tokens, packing = tiny._tokens([images])
    first = tiny.blocks[0](tokens, packing)
    first, last = (x.unflatten(0, (3, -1)) for x in (first, tiny.blocks[1](first, packing)))
    expected = torch.cat([tiny.norm(first)[:, 0], tiny.norm(last)[:, 0], tiny.norm(last)[:, 1:].mean(1)], dim=1)
    torch.testing.assert_close(feature(images), expected)
    assert name == "class token of the last 2 blocks and mean patch token [48]"
    with pytest.raises(UserError, match="give 1 to 2"):
        tokens_feature(tiny, 3)


def test_a_diverged_layer_is_right_nowhere():
    heads = linear.Heads(torch.full((4, 6), torch.nan), torch.zeros(6), (0.1, 1.0), 3)
    assert linear.accuracy(heads, torch.randn(5, 4), torch.zeros(5, dtype=torch.int64)) == [(0, 0), (0, 0)]


def coloured(root, names, count=6):
    rng = np.random.default_rng(0)
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.full((30, 34, 3), {"red": (220, 20, 20), "blue": (20, 20, 220)}[name])
            Image.fromarray((pixels + rng.integers(-9, 9, pixels.shape)).astype(np.uint8)).save(
                root / name / f"{i}.png"
            )
    return root


def test_the_command(tmp_path, checkpoint, capsys):
    data = coloured(tmp_path / "data", ("red", "blue"))
    (data / "red" / "broken.png").write_bytes(b"not a picture")
    words = ["eval", "linear", "--checkpoint", str(checkpoint), "--data", str(data), "--test", str(data)]
    words += ["--blocks", "2", "--epochs", "20", "--rates", "0.01", "0.1", "--features", str(tmp_path / "kept")]
    assert cli.main([*words, "--json", "--out", str(tmp_path / "out")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "out" / "linear.json").read_text())
    assert (printed["top1"], printed["train"], printed["left_out"]) == (1.0, 12, {"train": 1, "test": 1})
    assert [row["rate"] for row in printed["results"]] == [0.01, 0.1]
    assert load_file(tmp_path / "out" / "linear.safetensors")["linear.weight"].shape == (2, 32)
    assert len(list((tmp_path / "kept").iterdir())) == 1  # the training and the test images are the same here
    assert cli.main(words) == 0  # now from the kept features
    output = capsys.readouterr().out
    assert "the best epoch on the test images, as the original reports: 100.00 %" in output
    assert "linear top-1 100.00 %" in output and "1 of train" in output


def test_random_crops_are_torchvisions():
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    transform = Compose([RandomResizedCrop(32), RandomHorizontalFlip()])
    for seed in range(60):
        torch.manual_seed(seed)
        expected = np.asarray(transform(Image.fromarray(pixels)))
        got = random_crop(torch.from_numpy(pixels).permute(2, 0, 1), (32, 32), seed)
        assert np.array_equal(got.permute(1, 2, 0).numpy(), expected), seed


def test_random_crops_are_functions_of_seed_epoch_and_index(tmp_path):
    source = open_source(coloured(tmp_path / "data", ("red", "blue")))

    def crops(epoch, indices=None, batch_size=5):
        parts = list(random_batches(source, (16, 24), (0.5,) * 3, (0.5,) * 3, batch_size, 7, epoch, indices))
        return torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts])

    images, labels = crops(1)
    assert images.shape == (12, 3, 16, 24) and labels.tolist() == [0] * 6 + [1] * 6
    again, _ = crops(1, [9, 2], 2)
    assert torch.equal(again, images[[9, 2]]) and not torch.equal(images, crops(2)[0])


def test_the_command_with_random_crops(tmp_path, checkpoint):
    data = coloured(tmp_path / "data", ("red", "blue"))
    result, _ = linear.evaluate(checkpoint, data, data, blocks=1, epochs=3, crops="random", rates=[0.1], device="cpu")
    assert (result["top1"], result["crops"]) == (1.0, "random")


def test_the_last_and_the_best_epoch_are_reported(tmp_path, checkpoint, monkeypatch):
    shares = iter([[(0.25, 1.0), (0.5, 1.0)], [(1.0, 1.0), (0.25, 1.0)], [(0.5, 1.0), (0.75, 1.0)]])
    monkeypatch.setattr(linear, "accuracy", lambda heads, features, labels: next(shares))
    data = coloured(tmp_path / "data", ("red", "blue"))
    result, _ = linear.evaluate(checkpoint, data, data, blocks=1, epochs=3, rates=[0.1, 0.2], device="cpu")
    assert (result["rate"], result["top1"], result["best_epoch_top1"], result["best_epoch"]) == (0.2, 0.75, 0.75, 2)
    first = result["results"][0]
    assert (first["rate"], first["top1"], first["best_epoch_top1"], first["best_epoch"]) == (0.1, 0.5, 1.0, 1)


def test_cifar(cifar, checkpoint, tiny):
    train, test = cifar / "train.parquet", cifar / "test.parquet"
    result, _ = linear.evaluate(checkpoint, train, test, epochs=10, batch_size=64, rates=[0.01, 0.1], device="cpu")
    assert result["train"] == 500 and result["test"] == 250 and result["left_out"] == {"train": 0, "test": 0}
    parts = []
    for path in (train, test):
        for images, labels in eval_batches(open_source(path), 32, [0.5] * 3, [0.5] * 3, 500):
            layers = tiny.get_intermediate_layers(images, 2)
            parts.append((torch.cat([layer[:, 0] for layer in layers], 1).detach(), labels))
    (x, y), (queries, answers) = parts
    for row in result["results"]:
        layer = by_torch(x, y, 10, row["rate"], 10, 64, 0)
        expected = (layer(queries).argmax(1) == answers).float().mean().item()
        assert row["top1"] == pytest.approx(expected, abs=0.0041)  # one image of 250: other orders of summation
    assert result["top1"] > 0.15  # 0.1 is chance


@pytest.mark.parametrize(
    "options,message", [({"rates": []}, "one or more"), ({"rates": [0.0]}, "above 0"), ({"epochs": 0}, "at least 1")]
)
def test_bad_settings(options, message):
    with pytest.raises(UserError, match=message):
        linear.fit(lambda epoch: (torch.eye(3), torch.arange(3)), 3, **options)


def test_labels_that_are_missing_of_another_set_or_of_one_class(tmp_path, checkpoint):
    data = coloured(tmp_path / "data", ("red", "blue"))
    one = coloured(tmp_path / "one", ("red",))
    for name, labels in {"known": (0, 1), "other": (5, 6)}.items():
        rows = [f"data/red/{i}.png\t{labels[i % 2]}\n" for i in range(4)]
        (tmp_path / f"{name}.txt").write_text("".join(rows))
    cases = [
        (data / "red", None, "has no labels"),
        (one, one, "all labeled images .* are of one class"),
        (tmp_path / "known.txt", tmp_path / "other.txt", "2 classes that .* has none of: label 5, label 6"),
    ]
    for path, test, message in cases:
        with pytest.raises(UserError, match=message):
            linear.evaluate(checkpoint, path, test)
