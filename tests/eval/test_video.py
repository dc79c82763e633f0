"""Label propagation against its plain transcription, J and F against counting by hand, and DAVIS."""

from __future__ import annotations

import json
import shutil
import time

import numpy as np
import pytest
import torch
from PIL import Image

from dino_fast.cli import main as cli
from dino_fast.errors import UserError
from dino_fast.eval import video
from dino_fast.eval.boundary import dilate, f_measure, outline
from dino_fast.eval.common.backbone import open_backbone
from dino_fast.eval.segment import read_mask
from tests.original import video as original


def scene(frames, h, w, classes, dim=16, seed=0):
    """Features that drift from frame to frame, and one-hot masks of the first."""
    torch.manual_seed(seed)
    drift = torch.randn(h, w, dim)
    features = [drift + 0.3 * torch.randn(h, w, dim) for _ in range(frames)]
    first = torch.nn.functional.one_hot(torch.randint(0, classes, (h, w)), classes).permute(2, 0, 1).float()
    return features, first


@pytest.mark.parametrize(
    "frames,h,w,classes,last,radius,topk",
    [
        (11, 6, 9, 3, 7, 2, 5),
        (5, 30, 7, 2, 2, 12, 5),
        (3, 1, 1, 2, 7, 12, 1),
        (4, 9, 9, 2, 0, 3, 7),
        (6, 8, 11, 4, 7, 0, 5),
    ],
)
def test_propagation_equals_the_transcription(frames, h, w, classes, last, radius, topk):
    features, first = scene(frames, h, w, classes)
    settings = video.Settings(last, radius, topk)
    got = list(video.propagate(features, first, settings))
    expected = original.propagate(features, first, last, radius, topk)
    assert len(got) == len(expected) == frames - 1
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_without_a_reach_the_tiles_are_small(monkeypatch):
    monkeypatch.setattr(video, "_SIMILARITIES", 200)
    features, first = scene(4, 6, 9, 3)
    got = list(video.propagate(features, first, video.Settings(radius=0)))
    for one, other in zip(got, original.propagate(features, first, radius=0), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_propagation_is_five_times_as_fast_as_the_transcription():
    features, first = scene(6, 28, 28, 2, dim=64)
    list(video.propagate(features[:2], first))
    seconds = []
    for run in (lambda: list(video.propagate(features, first)), lambda: original.propagate(features, first)):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    assert seconds[1] > 5 * seconds[0]  # about 15 alone on two cores; the loops over patches do not profit from cores


def f_by_hand(mask, truth, tolerance=0.008):
    """Outlines and distances with plain loops."""

    def edge(m):
        h, w = m.shape
        near = [(y, x, min(y + 1, h - 1), min(x + 1, w - 1)) for y in range(h) for x in range(w)]
        return [(y, x) for y, x, b, r in near if m[y, x] != m[y, r] or m[y, x] != m[b, x] or m[y, x] != m[b, r]]

    radius = np.ceil(tolerance * np.hypot(*truth.shape))
    found, true = edge(mask), edge(truth)
    if not found or not true:
        return float(not found and not true)

    def share(these, those):
        return np.mean([any((y - v) ** 2 + (x - u) ** 2 <= radius**2 for v, u in those) for y, x in these])

    precision, recall = share(found, true), share(true, found)
    return 0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize("tolerance", [0.008, 0.1])
def test_f_equals_distances_by_hand(tolerance):
    truth = torch.zeros(24, 31, dtype=torch.bool)
    truth[4:17, 9:22] = True
    for top, left in ((4, 9), (6, 12), (0, 18), (20, 26)):
        mask = torch.zeros_like(truth)
        mask[top : top + 13, left : left + 13] = True
        mask[top + 2, left + 1] = False
        expected = f_by_hand(mask.numpy(), truth.numpy(), tolerance)
        assert f_measure(mask, truth, tolerance) == pytest.approx(expected, abs=1e-12)
    nothing = torch.zeros_like(truth)
    assert f_measure(nothing, nothing) == 1 and f_measure(nothing, truth) == 0 == f_measure(truth, nothing)


def test_a_dilated_pixel_is_a_disk_cut_at_the_border():
    mask = torch.zeros(9, 12, dtype=torch.bool)
    mask[1, 10] = True
    y, x = torch.meshgrid(torch.arange(9), torch.arange(12), indexing="ij")
    assert torch.equal(dilate(mask, 3), (y - 1) ** 2 + (x - 10) ** 2 <= 9)
    assert torch.equal(dilate(mask, 0), mask) and not outline(torch.ones(4, 4, dtype=torch.bool)).any()


def test_davis_equals_a_plain_pipeline(davis, checkpoint, tmp_path, capsys):
    words = ["eval", "video", "--checkpoint", str(checkpoint), "--data", str(davis), "--image-size", "64"]
    assert cli.main([*words, "--out", str(tmp_path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["objects"], printed["frames"]) == (3, 24)
    j, f = [], []
    frozen = open_backbone(checkpoint, device="cpu")
    for row in printed["sequences"]:
        frames = sorted((davis / "JPEGImages" / "480p" / row["name"]).iterdir())
        masks = sorted((davis / "Annotations" / "480p" / row["name"]).iterdir())
        features = []
        for path in frames:
            pixels = np.asarray(Image.open(path).resize((64, 64), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
            image = frozen.normalize(torch.from_numpy(pixels.copy())[None])
            features.append(frozen.backbone.forward_features(image)[0, 1:].view(8, 8, -1))
        start = np.asarray(Image.open(masks[0]).resize((8, 8), Image.Resampling.NEAREST)) > 0
        first = torch.from_numpy(np.stack([~start, start])).float()
        ours = []
        for i, soft in enumerate(original.propagate(features, first), start=1):
            large = torch.nn.functional.interpolate(soft[None], scale_factor=8, mode="bilinear")[0]
            for plane in large:
                if plane.max() > 0:
                    plane -= plane.min().item()
                    plane /= plane.max().item()
            labels = Image.fromarray(large.argmax(0).byte().numpy()).resize((854, 480), Image.Resampling.NEAREST)
            labels = np.asarray(labels)
            written = read_mask(tmp_path / row["name"] / f"{frames[i].stem}.png")
            assert (written != labels).mean() < 3e-4  # one pixel of 64 x 64, where both classes are equal
            if i < len(frames) - 1:
                truth = np.asarray(Image.open(masks[i])) > 0
                ours.append([((labels > 0) & truth).sum() / ((labels > 0) | truth).sum()])
                ours[-1].append(f_measure(torch.from_numpy(labels > 0), torch.from_numpy(truth)))
        means = np.mean(ours, axis=0)
        assert (row["j_mean"], row["f_mean"]) == pytest.approx(means, abs=1e-3)
        j.append(row["j_mean"])
        f.append(row["f_mean"])
    assert printed["j_mean"] == pytest.approx(np.mean(j)) and printed["f_mean"] == pytest.approx(np.mean(f))
    assert printed["jf_mean"] == pytest.approx((np.mean(j) + np.mean(f)) / 2)


def made(root, objects=(1, 2), frames=4, size=(40, 64)):
    """Coloured squares that move to the right by 8 pixels a frame, on noise, with palette masks."""
    rng = np.random.default_rng(0)
    for folder in ("JPEGImages", "Annotations"):
        (root / folder / "squares").mkdir(parents=True)
    for i in range(frames):
        pixels = rng.integers(0, 30, (*size, 3), dtype=np.uint8)
        mask = np.zeros(size, dtype=np.uint8)
        for value in objects:
            part = np.s_[16 * value - 8 : 16 * value + 8, 8 * i : 8 * i + 16]
            pixels[part] = (250, 40, 40) if value == 1 else (40, 250, 250)
            mask[part] = value
        Image.fromarray(pixels).save(root / "JPEGImages" / "squares" / f"{i:05d}.png")
        image = Image.fromarray(mask).convert("P")
        image.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0])
        image.save(root / "Annotations" / "squares" / f"{i:05d}.png")
    return root


def test_objects_that_are_easy_to_tell_are_followed(tmp_path, tiny, checkpoint, capsys):
    data = made(tmp_path / "data")
    words = ["eval", "video", "--checkpoint", str(checkpoint), "--data", str(data), "--image-size", "40"]
    assert cli.main([*words, "--out", str(tmp_path / "out")]) == 0
    output = capsys.readouterr().out
    assert "2 objects in 1 sequences, 4 frames" in output and "squares" in output
    result = video.evaluate(checkpoint, data, image_size=40, device="cpu")
    assert result["j_mean"] > 0.5
    assert set(np.unique(read_mask(tmp_path / "out" / "squares" / "00002.png"))) == {0, 1, 2}


def test_sequences_that_do_not_fit_together(tmp_path, checkpoint):
    def broken(change, message, **options):
        root = tmp_path / "data"
        shutil.rmtree(root, ignore_errors=True)
        made(root)
        change(root / "JPEGImages" / "squares", root / "Annotations" / "squares")
        with pytest.raises(UserError, match=message):
            video.evaluate(checkpoint, root, image_size=40, **options)

    def of_size(path, size):
        Image.open(path).resize(size).save(path)

    broken(lambda f, m: (f / "00003.png").unlink(), "3 frames and 4 masks.*00003.*end early")
    broken(lambda f, m: (m / "00002.png").unlink(), "4 frames and 3 masks.*00002")
    broken(lambda f, m: of_size(m / "00002.png", (64, 20)), r"00002\.png is 64x20, the first one 64x40")
    broken(lambda f, m: of_size(f / "00001.png", (32, 40)), r"00001\.png is 32x40, the first mask .* 64x40")
    broken(lambda f, m: (f / "00002.png").write_bytes(b"\x89PNG"), r"00002\.png")
    broken(lambda f, m: shutil.rmtree(m), "has no masks")
    broken(lambda f, m: shutil.rmtree(m.parent), "a DAVIS folder has")
    broken(lambda f, m: None, "no sequence 'square'; did you mean 'squares'", sequences=["square"])
    broken(lambda f, m: None, "topk is at least 1", settings=video.Settings(topk=0))

    def blank(frames, masks):
        Image.fromarray(np.zeros((40, 64), dtype=np.uint8)).save(masks / "00000.png")

    broken(blank, "has no object to follow")

    def dot(frames, masks):
        mask = np.zeros((40, 64), dtype=np.uint8)
        mask[0, 0] = 1
        Image.fromarray(mask).save(masks / "00000.png")

    broken(dot, "smaller than a patch")
    short = made(tmp_path / "short", frames=2)
    with pytest.raises(UserError, match="has 2 frames"):
        video.evaluate(checkpoint, short, image_size=40)
