"""The CUDA kernels of multi_crop on a GPU: the bits of the native backend, nothing waited for."""

from __future__ import annotations

import pytest
import torch

from dino_fast.augment import MultiCrop
from dino_fast.backends import choose, cuda_unavailable_reason
from dino_fast.ops.multi_crop import tables

from .test_multi_crop import CASES, OFF, SMALL, pictures

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(cuda_unavailable_reason() is not None, reason=str(cuda_unavailable_reason())),
]
EXTENTS = ((61, 83), (120, 40), (28, 28), (375, 500), (1, 1), (20, 3000))


def assert_equals_native(crops: MultiCrop, images: list[torch.Tensor], **options) -> None:
    params = crops.sample(len(images), torch.Generator().manual_seed(0))
    native = crops.apply(images, params, backend="native", **options)
    on_gpu = crops.apply([image.cuda() for image in images], params, backend="cuda", **options)
    for got, wanted in zip(on_gpu, native, strict=True):
        assert got.is_cuda and torch.equal(got.cpu(), wanted)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("case", [*CASES, "chain"])
def test_equals_native(case, channels):
    crops = MultiCrop(**SMALL, **({} if case == "chain" else OFF | CASES[case]))
    assert_equals_native(crops, pictures(channels, *EXTENTS) * 4)


@pytest.mark.parametrize("down_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_published_sizes(dtype, down_first, monkeypatch):
    monkeypatch.setattr(tables, "MAY_GO_DOWN_FIRST", down_first)
    assert_equals_native(MultiCrop(), pictures(3, *EXTENTS, (900, 375)) * 4, dtype=dtype)


def test_chosen_by_the_images_device():
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    assert choose("multi_crop", image.cuda()) == "cuda" and choose("multi_crop", image) == "native"


def test_nothing_is_waited_for_and_streams_are_kept():
    crops, images = MultiCrop(), [image.cuda() for image in pictures(3, *EXTENTS)]
    params = crops.sample(len(images), torch.Generator().manual_seed(0))
    expected = crops.apply(images, params)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)
            late = [image.clone() for image in images]
            made = crops.apply(late, params)
            assert not side.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))


def test_the_reference_takes_images_on_a_gpu():
    crops, images = MultiCrop(**SMALL), [image.cuda() for image in pictures(3, (61, 83))]
    params = crops.sample(1, torch.Generator().manual_seed(0))
    a, b = (crops.apply(images, params, backend=name) for name in ("cuda", "reference"))
    assert all(x.is_cuda and torch.allclose(x, y, atol=1e-5) for x, y in zip(a, b, strict=True))
