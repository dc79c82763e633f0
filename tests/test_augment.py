"""The crops against torchvision's own transforms on Pillow images, same parameters forced: bit for bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torchvision.transforms as tvt
import torchvision.transforms.functional as tvf
from PIL import Image

from dino_fast.augment import CropParams, MultiCrop
from dino_fast.data import open_source
from dino_fast.errors import UserError

SMALL = {"global_size": 48, "local_size": (20, 24), "n_local": 3}
OFF = {"flip_p": 0.0, "jitter_p": 0.0, "grey_p": 0.0, "blur_p": (0.0, 0.0, 0.0), "solarize_p": (0.0, 0.0, 0.0)}


def photos(channels: int) -> list[torch.Tensor]:
    """Two photographs that scikit-learn ships, at different sizes; or pictures of the demo set."""
    if channels == 1:
        demo = open_source("demo")
        return [demo.read(i) for i in range(4)]
    from sklearn.datasets import load_sample_images

    pictures = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    return [
        torch.from_numpy(np.array(p.resize(size))).permute(2, 0, 1).contiguous()
        for p, size in zip(pictures, [(320, 213), (150, 200)], strict=True)
    ]


def original(image: torch.Tensor, p: CropParams, crops: MultiCrop, i: int, v: int) -> torch.Tensor:
    """The crop as the published pipeline makes it with torchvision, its random choices replaced by `p`'s."""
    picture = tvf.to_pil_image(image)
    size = crops.global_size if v < 2 else crops.local_size
    size = (size, size) if isinstance(size, int) else size
    top, left, h, w = crops.boxes(p[i], [tuple(image.shape[1:])])[0, v].tolist()
    picture = tvf.resized_crop(picture, top, left, h, w, size, tvf.InterpolationMode.BICUBIC)
    if p.flip[i, v]:
        picture = tvf.hflip(picture)
    if p.jitter[i, v]:
        functions = (tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation, tvf.adjust_hue)
        for op in [op for op in p.order[i, v].tolist() if crops.jitter[op] > 0]:
            picture = functions[op](picture, p.factors[i, v, op].item())
    if p.grey[i, v]:
        picture = tvf.rgb_to_grayscale(picture, num_output_channels=len(image))
    if p.blur[i, v]:
        from PIL import ImageFilter

        picture = picture.filter(ImageFilter.GaussianBlur(radius=p.radius[i, v].item()))
    if p.solarize[i, v]:
        from PIL import ImageOps

        picture = ImageOps.solarize(picture)
    mean, std = crops.statistics(len(image))
    return tvf.normalize(tvf.to_tensor(picture), mean.flatten().tolist(), std.flatten().tolist())


CASES = {
    "crop": {},
    "flip": {"flip_p": 1.0},
    "brightness": {"jitter_p": 1.0, "jitter": (0.4, 0.0, 0.0, 0.0)},
    "contrast": {"jitter_p": 1.0, "jitter": (0.0, 0.4, 0.0, 0.0)},
    "saturation": {"jitter_p": 1.0, "jitter": (0.0, 0.0, 0.9, 0.0)},
    "hue": {"jitter_p": 1.0, "jitter": (0.0, 0.0, 0.0, 0.5)},
    "grey": {"grey_p": 1.0},
    "blur": {"blur_p": (1.0, 1.0, 1.0)},
    "solarize": {"solarize_p": (1.0, 1.0, 1.0)},
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("case", [*CASES, "chain"])
def test_equals_torchvision(case: str, channels: int) -> None:
    crops = MultiCrop(**SMALL, **({} if case == "chain" else OFF | CASES[case]))
    images = photos(channels) * (8 if case == "chain" else 2)
    params = crops.sample(len(images), torch.Generator().manual_seed(3))
    globals_, locals_ = crops.apply(images, params)
    assert globals_.shape == (2, len(images), channels, 48, 48) and locals_.shape == (3, len(images), channels, 20, 24)
    for i, image in enumerate(images):
        for v in range(5):
            got = globals_[v, i] if v < 2 else locals_[v - 2, i]
            torch.testing.assert_close(got, original(image, params, crops, i, v), rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", [c for c in CASES if c not in ("crop", "saturation", "hue", "grey")])
def test_each_operation_changes_pixels(case: str) -> None:
    images = photos(1)
    crops, plain = MultiCrop(**SMALL, **OFF | CASES[case]), MultiCrop(**SMALL, **OFF)
    with_it = crops.apply(images, crops.sample_each(range(4)))[0]
    without = plain.apply(images, plain.sample_each(range(4)))[0]
    assert (with_it - without).abs().mean() > 0.01


@pytest.mark.parametrize("extent", [(213, 320), (28, 28), (600, 100)])
def test_boxes_are_distributed_as_torchvisions(extent: tuple[int, int]) -> None:
    """Two-sample Kolmogorov-Smirnov distance of each coordinate below the 1e-4 quantile."""
    n = 4000
    crops = MultiCrop(n_local=0, global_scale=(0.3, 0.8))
    boxes = crops.boxes(crops.sample(n, torch.Generator().manual_seed(0)), [extent] * n)[:, 0]
    torch.manual_seed(1)
    blank = torch.empty(1, *extent)
    theirs = np.array([tvt.RandomResizedCrop.get_params(blank, [0.3, 0.8], [3 / 4, 4 / 3]) for _ in range(n)])
    limit = math.sqrt(-0.5 * math.log(0.5e-4)) * math.sqrt(2 / n)
    for k in range(4):
        grid = np.arange(max(extent) + 1)
        ours_cdf = np.searchsorted(np.sort(boxes[:, k]), grid, side="right") / n
        their_cdf = np.searchsorted(np.sort(theirs[:, k]), grid, side="right") / n
        assert np.abs(ours_cdf - their_cdf).max() < limit, k


def test_fallback_boxes_are_torchvisions() -> None:
    crops = MultiCrop(n_local=0, global_scale=(1.0, 1.0))
    for extent in [(30000, 20), (20, 30000), (1, 1), (1, 50), (100, 200)]:
        boxes = crops.boxes(crops.sample(1, torch.Generator().manual_seed(0)), [extent])[0, 0].tolist()
        theirs = tvt.RandomResizedCrop.get_params(torch.empty(1, *extent), [1.0, 1.0], [3 / 4, 4 / 3])
        assert boxes == list(theirs), extent


def test_frequencies_and_ranges() -> None:
    p = MultiCrop().sample(4000, torch.Generator().manual_seed(0))
    for name, expected in [("flip", [0.5] * 10), ("jitter", [0.8] * 10), ("grey", [0.2] * 10),
                           ("blur", [1, 0.1] + [0.5] * 8), ("solarize", [0, 0.2] + [0] * 8)]:  # fmt: skip
        found = getattr(p, name).float().mean(0)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), rtol=0, atol=0.04)
    low, high = p.factors.amin((0, 1)), p.factors.amax((0, 1))
    torch.testing.assert_close(low, torch.tensor([0.6, 0.6, 0.8, -0.1]), rtol=0, atol=1e-3)
    torch.testing.assert_close(high, torch.tensor([1.4, 1.4, 1.2, 0.1]), rtol=0, atol=1e-3)
    assert 0.1 <= p.radius.min() < 0.11 and 1.99 < p.radius.max() <= 2
    assert len(p.order.reshape(-1, 4).unique(dim=0)) == 24


def test_sampling_one_by_one_equals_sampling_each_and_round_trips() -> None:
    crops = MultiCrop(**SMALL)
    seeds = [5, 2**40, 5, 77]
    parts = [crops.sample(1, torch.Generator().manual_seed(s)) for s in seeds]
    joined, each = CropParams.concatenate(parts), crops.sample_each(seeds)
    back = CropParams.from_dict(each.to_dict())
    for name, value in joined.to_dict().items():
        assert torch.equal(value, each.to_dict()[name]) and torch.equal(value, back.to_dict()[name]), name
    assert len(each) == 4 and torch.equal(each[0].area, each[2].area) and not torch.equal(each[0].area, each[1].area)
    images = photos(1)
    whole = crops.apply(images, each)
    one = crops.apply([images[3], images[1]], each[[3, 1]])
    assert torch.equal(whole[0][:, [3, 1]], one[0]) and torch.equal(whole[1][:, [3, 1]], one[1])
    assert torch.equal(crops.apply([images[3]], each[-1])[1], whole[1][:, 3:])


def test_number_of_local_crops_leaves_the_global_ones() -> None:
    many, none = MultiCrop(global_size=28, local_size=14), MultiCrop(global_size=28, local_size=14, n_local=0)
    images = photos(1)
    with_locals, without = (
        many.apply(images, many.sample_each(range(4))),
        none.apply(images, none.sample_each(range(4))),
    )
    assert torch.equal(with_locals[0], without[0]) and without[1].shape == (0, 4, 1, 14, 14)


@pytest.mark.parametrize("channels", [2, 4, 16])
def test_other_channel_counts_are_cut_plane_by_plane(channels: int) -> None:
    plane = photos(3)[0][:1]
    crops = MultiCrop(**SMALL, mean=(0.5,), std=(0.25,))
    params = crops.sample_each([4])
    got = crops.apply([plane.repeat(channels, 1, 1)], params)
    want = crops.apply([plane], params)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b.repeat(1, 1, channels, 1, 1))
    assert crops.skipped(channels) == ("saturation", "hue", "grey") and crops.skipped(3) == ()
    assert MultiCrop(jitter_p=0.0, grey_p=0.0).skipped(1) == ()


def test_grey_statistics_are_the_luma_of_three() -> None:
    mean, std = MultiCrop().statistics(1)
    assert mean.item() == pytest.approx(0.459, abs=1e-3) and std.shape == (1, 1, 1)


@pytest.mark.parametrize(
    "wrong",
    [{"global_size": 0}, {"n_local": -1}, {"local_scale": (0.5, 0.4)}, {"global_scale": (0.0, 1.0)}, {"flip_p": 1.5},
     {"blur_radius": (2.0, 0.1)}, {"std": (0.0,)}, {"jitter": (0.4, 0.4, 0.2, 0.6)}, {"ratio": (2.0, 1.0)}],
)  # fmt: skip
def test_wrong_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(UserError, match="accepted"):
        MultiCrop(**wrong)


def test_images_that_do_not_fit_are_refused() -> None:
    crops = MultiCrop(**SMALL)
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    for images in ([image.double()], [image[:, :0]], [image[0]], [image, image]):
        with pytest.raises(ValueError, match="apply"):
            crops.apply(images, crops.sample_each([0]))
    with pytest.raises(ValueError, match="channels"):
        crops.apply([torch.zeros(17, 8, 8, dtype=torch.uint8)], crops.sample_each([0]))
    with pytest.raises(UserError, match="mean has 3 entries for images of 4 channels"):
        crops.apply([torch.zeros(4, 8, 8, dtype=torch.uint8)], crops.sample_each([0]))
