"""Fine-tuning against a plain loop with torch's own pieces, the draws, and the command."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dino_fast.cli import main as cli
from dino_fast.data import open_source
from dino_fast.errors import UserError
from dino_fast.eval import finetune
from dino_fast.eval.common.crops import random_crop
from dino_fast.models.weights.read import load_backbone
from dino_fast.seeding import derive_seed

PLAIN = finetune.Recipe(
    epochs=3, batch_size=4, lr=0.05, warmup_epochs=1, drop_path=0.0, mixup=0, cutmix=0, operations=0, erase=0.0, seed=5
)


@pytest.fixture
def colours(tmp_path):
    rng = np.random.default_rng(0)
    for name, colour in {"red": (220, 20, 20), "green": (20, 220, 20), "blue": (20, 20, 220)}.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(6):
            pixels = np.array(colour) + rng.integers(-15, 15, (36, 30, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(tmp_path / "data" / name / f"{i}.png")
    return tmp_path / "data"


def by_hand(backbone, source, recipe):
    """The same images in the same order through torch's loss, AdamW and LambdaLR."""
    head = torch.nn.Linear(16, 3)
    torch.nn.init.trunc_normal_(
        head.weight, std=0.02, generator=torch.Generator().manual_seed(derive_seed(recipe.seed, 14))
    )
    torch.nn.init.zeros_(head.bias)
    backbone.requires_grad_(True).train()
    named = [*((f"backbone.{n}", p) for n, p in backbone.named_parameters()), ("w", head.weight), ("b", head.bias)]
    free = [p for n, p in named if p.ndim == 1 or "pos_embed" in n or "cls_token" in n]
    decayed = [p for n, p in named if p.ndim > 1 and "pos_embed" not in n and "cls_token" not in n]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": free, "weight_decay": 0.0}], weight_decay=0.05)
    top, steps, losses = recipe.lr * 4 / 512, 5, []
    for epoch in range(3):
        order = torch.randperm(18, generator=torch.Generator().manual_seed(derive_seed(recipe.seed, 0, epoch)))
        total = []
        for number, part in enumerate(order.split(4)):
            images = [
                random_crop(source.read(i), (32, 32), derive_seed(recipe.seed, 11, epoch, i)) for i in part.tolist()
            ]
            x = (torch.stack(images).float() / 255 - 0.5) / 0.5
            y = torch.tensor([source.label(i) for i in part.tolist()])
            step = epoch * steps + number
            warm, rest = step / 5, (step - 5) / 10
            rate = 1e-6 + (top - 1e-6) * (warm if step < 5 else 0.5 * (1 + math.cos(math.pi * rest)))
            for group in optimizer.param_groups:
                group["lr"] = rate
            logs = torch.log_softmax(head(backbone(x)), dim=1)
            loss = (-0.9 * logs.gather(1, y[:, None])[:, 0] - 0.1 * logs.mean(dim=1)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total.append(loss.item())
        losses.append(np.mean(total))
    return losses, head


def test_training_equals_a_plain_loop(colours, checkpoint):
    source, statistic = open_source(colours), {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    losses = []
    given = load_backbone(checkpoint)
    model, used = finetune.fit(
        given, source, 3, (32, 32), PLAIN, **statistic, on_epoch=lambda epoch, loss: losses.append(loss)
    )
    other = load_backbone(checkpoint)
    expected, head = by_hand(other, source, PLAIN)
    assert used == 18 and losses == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(model.head.weight, head.weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.backbone.cls_token, other.cls_token, rtol=1e-4, atol=1e-5)
    assert losses[-1] < losses[0]


def test_workers_change_nothing(colours, checkpoint):
    source, recipe = open_source(colours), finetune.Recipe(batch_size=7, seed=2)
    one, two = (list(finetune.batches(source, (32, 32), recipe, 1, workers)) for workers in (0, 2))
    for a, b in zip(one, two, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert sorted(torch.cat([index for _, _, index in one]).tolist()) == list(range(18))
    assert [len(index) for _, _, index in one] == [7, 7, 4]


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_targets_are_the_shares_of_the_pixels(kind):
    recipe = finetune.Recipe(mixup=0.8 * (kind == "mixup"), cutmix=1.0 * (kind == "cutmix"))
    images = torch.stack([torch.full((3, 20, 30), float(i)) for i in range(4)])
    targets = torch.eye(4)
    shares = set()
    for batch in range(8):
        x, y = finetune.mixed(images, targets, recipe, 0, batch)
        share = y[0, 0].item()
        shares.add(round(share, 6))
        assert torch.allclose(y.sum(dim=1), torch.ones(4)) and y[0, 3] == pytest.approx(1 - share)
        assert x[0].mean().item() == pytest.approx(3 * (1 - share), abs=1e-4)  # image 0 is 0, its partner 3
        assert set(x[0].unique().tolist()) <= {0.0, 3.0} or kind == "mixup"
        again = finetune.mixed(images, targets, recipe, 0, batch)
        assert torch.equal(again[0], x) and torch.equal(again[1], y)
    assert len(shares) > 4


def test_the_command(colours, checkpoint, tmp_path, capsys):
    (colours / "red" / "broken.png").write_bytes(b"?")
    words = ["eval", "finetune", "--checkpoint", str(checkpoint), "--data", str(colours), "--test", str(colours)]
    words += ["--epochs", "12", "--batch-size", "6", "--lr", "0.4", "--warmup-epochs", "1", "--json"]
    assert cli.main([*words, "--out", str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    printed = json.loads(captured.out)
    assert printed["top1"] == 1.0 and printed["left_out"] == {"train": 1, "test": 1}
    assert (printed["train"], printed["test"], captured.err.count("loss")) == (18, 18, 12)
    kept = load_file(tmp_path / "out" / "finetune.safetensors")
    assert kept["head.weight"].shape == (3, 16) and "backbone.cls_token" in kept


def test_cifar_is_learned_somewhat(cifar, checkpoint):
    recipe = finetune.Recipe(
        epochs=8, batch_size=50, lr=0.02, warmup_epochs=1, mixup=0, cutmix=0, operations=0, erase=0
    )
    result, _ = finetune.evaluate(
        checkpoint, cifar / "train.parquet", cifar / "test.parquet", recipe=recipe, device="cpu"
    )
    assert (result["train"], result["test"]) == (500, 250)
    assert result["top1"] > 0.15  # 0.1 is chance


@pytest.mark.parametrize(
    "options,message",
    [({"epochs": 0}, "above 0"), ({"drop_path": 1.0}, "drop_path is 1.0"), ({"lr": -1.0}, "lr -1.0")],
)
def test_bad_settings(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        finetune.evaluate(tmp_path, tmp_path, recipe=finetune.Recipe(**options))


def test_a_loss_that_is_not_finite(colours, checkpoint):
    recipe = finetune.Recipe(epochs=4, batch_size=6, lr=1e30, warmup_epochs=0)
    with pytest.raises(UserError, match="try a lower --lr"):
        finetune.evaluate(checkpoint, colours, colours, recipe=recipe, device="cpu")
