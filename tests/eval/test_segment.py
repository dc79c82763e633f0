"""Jaccard of attention masks against pixel-by-pixel counting, on drawn masks and on DAVIS."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dino_fast.cli import main as cli
from dino_fast.errors import UserError
from dino_fast.eval import segment
from dino_fast.eval.common.backbone import open_backbone
from dino_fast.eval.common.frames import fit_to_patches, read_image


def counted(mask, truth, value):
    """Jaccard with the object `value` with plain loops; void pixels (255) are passed over."""
    both = either = 0
    for y in range(truth.shape[0]):
        for x in range(truth.shape[1]):
            if truth[y, x] != 255:
                both += bool(mask[y, x]) and truth[y, x] == value
                either += bool(mask[y, x]) or truth[y, x] == value
    return both / either


def by_hand(checkpoint, image_path, truth, size, mass=0.6):
    """The Jaccard index of each object with each head: sort, add up, look up the patch of each pixel."""
    frozen = open_backbone(checkpoint, device="cpu")
    seen = fit_to_patches(read_image(image_path), size, 8)
    rows = frozen.backbone.get_last_selfattention(frozen.normalize(seen[None]))[0, :, 0, 1:].double().numpy()
    h, w = seen.shape[1] // 8, seen.shape[2] // 8
    scores = []  # [heads, objects]
    for row in rows:
        kept, held = np.zeros(h * w, dtype=bool), 0.0
        for i in np.argsort(-row):
            if held >= mass * row.sum():
                break
            kept[i] = True
            held += row[i]
        height, width = truth.shape
        grid = kept.reshape(h, w)
        mask = [[grid[y * h // height, x * w // width] for x in range(width)] for y in range(height)]
        scores.append([counted(np.array(mask), truth, value) for value in np.unique(truth) if value not in (0, 255)])
    return np.array(scores).T


def pairs(root, masks):
    rng = np.random.default_rng(1)
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for name, mask in masks.items():
        pixels = rng.integers(0, 256, (*mask.shape, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{name}.png")
        image = Image.fromarray(mask, mode="P") if mask.max() > 1 else Image.fromarray(mask * 255)
        if image.mode == "P":
            image.putpalette([value for i in range(256) for value in (i, 255 - i, 7 * i % 256)])
        image.save(root / "masks" / f"{name}.png")
    return root


def test_the_command_equals_counting_by_hand(tmp_path, checkpoint, capsys):
    truth = {name: np.zeros((40, 50), dtype=np.uint8) for name in ("grey", "palette", "nothing")}
    truth["grey"][5:30, 10:45] = 1
    truth["palette"][12:33, 3:20], truth["palette"][:4], truth["palette"][20:36, 24:48] = 14, 255, 3
    data = pairs(tmp_path, truth)
    words = ["eval", "segment", "--checkpoint", str(checkpoint), "--data", str(data), "--image-size", "64"]
    assert cli.main([*words, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    tables = [by_hand(checkpoint, data / "images" / f"{n}.png", truth[n], 64) for n in ("grey", "palette")]
    assert [len(table) for table in tables] == [1, 2] and printed["objects"] == 3
    # As facebookresearch/dino#54: for each object the best head, then the mean over an image's objects.
    assert printed["jaccard"] == pytest.approx(np.mean([table.max(axis=1).mean() for table in tables]), abs=1e-12)
    assert printed["heads"] == pytest.approx(np.mean([table.mean(axis=0) for table in tables], axis=0), abs=1e-12)
    assert printed["best_head_jaccard"] == max(printed["heads"]) == printed["heads"][printed["best_head"]]
    assert printed["images"] == 2 and printed["left_out"]["images whose mask has no object"] == 1
    assert cli.main(words) == 0
    output = capsys.readouterr().out
    assert "3 objects in 2 images)" in output and "1 of images whose mask has no object" in output


def spread(masks, height, width):
    """Each pixel of `[..., height, width]` is the patch of `[..., h, w]` that it lies in."""
    rows = torch.arange(height) * masks.shape[-2] // height
    columns = torch.arange(width) * masks.shape[-1] // width
    return masks[..., rows[:, None], columns]


def test_jaccard():
    truth = torch.tensor([[True, True], [False, False]])
    masks = torch.stack((truth, ~truth, torch.ones(2, 2, dtype=torch.bool), torch.zeros(2, 2, dtype=torch.bool)))
    assert segment.jaccard(masks, truth).tolist() == [1, 0, 0.5, 0]
    assert segment.jaccard(~truth, truth, torch.tensor([[False, True], [False, False]])).tolist() == 0
    assert segment.jaccard(~truth, truth, torch.tensor([[False, False], [True, False]])).tolist() == 0
    assert segment.jaccard(truth ^ truth, truth ^ truth).tolist() == 1


@pytest.mark.parametrize("size", [(31, 45), (8, 9), (3, 4)])  # also images of fewer pixels than patches
def test_jaccard_by_patches_is_that_of_the_pixels(size):
    rng = np.random.default_rng(0)
    kept, (truth, valid) = torch.from_numpy(rng.random((6, 5, 7)) < 0.4), torch.from_numpy(rng.random((2, *size)) < 0.6)
    kept[0] = False
    large = spread(kept, *size)
    for where in (valid, torch.ones_like(valid), torch.zeros_like(valid)):
        assert torch.equal(segment.patch_jaccard(kept, truth, where), segment.jaccard(large, truth, where))


def test_masks_in_every_form(tmp_path):
    numbers = np.array([[0, 1], [2, 255]], dtype=np.uint8)
    palette = Image.fromarray(numbers, mode="P")
    palette.putpalette([9] * 768)  # equal colours: only the indices tell
    colours = np.array([[[0, 0, 0], [128, 0, 0]], [[0, 128, 0], [0, 0, 0]]], dtype=np.uint8)
    cases = [
        (palette, [[0, 1], [2, 255]]),
        (Image.fromarray(numbers), [[0, 1], [2, 255]]),
        (Image.fromarray(np.array([[0, 255], [255, 0]], dtype=np.uint8)), [[0, 1], [1, 0]]),
        (Image.fromarray(colours), [[0, 2], [1, 0]]),
        (Image.fromarray(np.array([[False, True]])), [[0, 1]]),
    ]
    for image, expected in cases:
        image.save(tmp_path / "mask.png")
        assert segment.read_mask(tmp_path / "mask.png").tolist() == expected
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path / "photo.png")
    with pytest.raises(UserError, match="a picture, not a mask"):
        segment.read_mask(tmp_path / "photo.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "photo.png").read_bytes()[:900])
    with pytest.raises(UserError, match=r"cut\.png cannot be read"):
        segment.read_mask(tmp_path / "cut.png")


def test_masks_that_are_missing_of_another_size_or_empty(tmp_path, checkpoint):
    mask = np.ones((20, 24), dtype=np.uint8)
    data = pairs(tmp_path / "set", {"a": mask, "b": mask})
    Image.fromarray(mask[:10] * 255).save(data / "masks" / "b.png")
    with pytest.raises(UserError, match=r"b\.png is 24x10 pixels, its image .*b\.png is 24x20"):
        segment.evaluate(checkpoint, data, image_size=32)
    (data / "masks" / "b.png").unlink()
    with pytest.raises(UserError, match=r"1 images of .* have no mask in .*: b"):
        segment.evaluate(checkpoint, data, image_size=32)
    (data / "images" / "a.png").unlink()
    with pytest.raises(UserError, match=r"1 masks of .* have no image in .*: a"):
        segment.evaluate(checkpoint, data, image_size=32)
    with pytest.raises(UserError, match="name their folder with --masks"):
        segment.evaluate(checkpoint, data / "images", image_size=32)
    nothing = pairs(tmp_path / "nothing", {"a": mask * 0})
    with pytest.raises(UserError, match="no mask of the 1 has an object"):
        segment.evaluate(checkpoint, nothing, image_size=32)


def test_voc_counts_the_images_without_a_mask(tmp_path, checkpoint):
    data = pairs(tmp_path, {"a": np.ones((20, 24), dtype=np.uint8), "b": np.ones((20, 24), dtype=np.uint8)})
    (data / "images").rename(data / "JPEGImages")
    (data / "masks").rename(data / "SegmentationClass")
    (data / "SegmentationClass" / "b.png").unlink()
    result = segment.evaluate(checkpoint, data, image_size=32, device="cpu")
    assert (result["images"], result["left_out"]["images without a mask"]) == (1, 1)


def test_davis(davis, checkpoint):
    result = segment.evaluate(checkpoint, davis, image_size=64, device="cpu")
    assert result["images"] == 24 and 0 < result["best_head_jaccard"] <= result["jaccard"] < 1
    name = "480p/dog/00003"
    folder = davis / "Annotations" / "480p" / "dog"
    only = segment.evaluate(checkpoint, davis / "JPEGImages" / "480p" / "dog", folder, image_size=64, device="cpu")
    assert only["images"] == 8
    truth = np.asarray(Image.open(davis / "Annotations" / f"{name}.png")) // 255
    image = davis / "JPEGImages" / f"{name}.jpg"
    frozen = open_backbone(checkpoint, device="cpu")
    _, maps = segment.attention_maps(frozen, read_image(image), 64)
    masks = spread(segment.mass_mask(maps.flatten(1)).view_as(maps), *truth.shape)
    got = segment.jaccard(masks, torch.from_numpy(truth > 0))
    assert got.tolist() == pytest.approx(by_hand(checkpoint, image, truth, 64)[0], abs=1e-12)
