"""The CUDA kernels of multi_crop without a GPU: their block bodies and their tables, compiled for the host, must give
the bits of the native backend, which are Pillow's.

What this cannot show (launch geometry, memory ordering between launches) needs the GPU tests. That nvcc compiles the
arithmetic to the same steps, test_multi_crop_cuda_build.py shows."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from dino_fast.augment import MultiCrop
from dino_fast.ops import multi_crop
from dino_fast.ops.multi_crop import cuda as multi_crop_cuda
from dino_fast.ops.multi_crop import tables

from .test_multi_crop import CASES, OFF, SMALL, pictures

ROOT = Path(__file__).parents[2]
CANARY = 64


class HostTable:
    """What `dino_fast._C.CudaMultiCropTable` offers."""

    def __init__(self, library: ctypes.CDLL, handle: int) -> None:
        self.library, self.handle = library, ctypes.c_void_p(handle)
        self.table_bytes, self.memory_bytes = library.table_bytes(self.handle), library.memory_bytes(self.handle)
        self.grids = [library.grid(self.handle, kernel) for kernel in range(6)]

    def write(self, address: int) -> None:
        self.library.write_table(self.handle, ctypes.c_void_p(address))

    def __del__(self) -> None:
        self.library.free_table(self.handle)


class HostKernels:
    """What `dino_fast._C` offers, over the host library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library, self.backwards, self.grids = library, False, []
        library.make_table.restype = ctypes.c_void_p
        library.table_bytes.restype = library.memory_bytes.restype = ctypes.c_uint64
        library.grid.restype = ctypes.c_uint32

    def cuda_multi_crop_table(self, n, table, numbers, channels, half, down_first, mean, std) -> HostTable:
        assert table.flags.c_contiguous and numbers.flags.c_contiguous
        error = ctypes.create_string_buffer(256)
        pointers = [ctypes.c_void_p(address) for address in (table.ctypes.data, numbers.ctypes.data, mean, std)]
        handle = self.library.make_table(
            ctypes.c_int64(n), *pointers[:2], channels, int(half), int(down_first), *pointers[2:], error
        )
        if not handle:
            raise ValueError(error.value.decode())
        return HostTable(self.library, handle)

    def cuda_multi_crop(self, table: HostTable, base: int, stream: int) -> None:
        """In memory of its own, all but the table poisoned, with a stretch behind it that must stay as it is."""
        memory = np.full(table.memory_bytes + CANARY + 16, 0xA5, np.uint8)
        memory = memory[-memory.ctypes.data % 16 :]
        ctypes.memmove(memory.ctypes.data, base, table.table_bytes)
        self.library.run_kernels(table.handle, ctypes.c_uint64(memory.ctypes.data), int(self.backwards))
        assert (memory[table.memory_bytes :] == 0xA5).all(), "written beyond the plan's memory"
        self.grids = table.grids


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    target = tmp_path_factory.mktemp("host") / "multi_crop.so"
    source = Path(__file__).with_name("multi_crop_on_host.cpp")
    # Undefined behaviour (an index past an int, an overflow) ends the process with a message.
    checks = ["-fsanitize=undefined", "-fno-sanitize-recover=all", "-static-libubsan", "-ffp-contract=off"]
    command = [compiler, "-std=c++17", "-O2", "-Wall", "-Wextra", "-Wno-unknown-pragmas", *checks, "-shared", "-fPIC"]
    subprocess.run([*command, f"-I{ROOT / 'csrc'}", str(source), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


@pytest.fixture
def kernels(library, monkeypatch) -> HostKernels:
    host = HostKernels(library)
    monkeypatch.setattr(multi_crop_cuda, "_kernels", lambda: host)
    monkeypatch.setattr(multi_crop_cuda, "_stream", lambda tensor: 0)
    monkeypatch.setitem(multi_crop._RUN, "reference", multi_crop_cuda.multi_crop)  # runs in the reference's place
    return host


def assert_equals_native(crops: MultiCrop, images: list[torch.Tensor], seed: int = 0, **options) -> None:
    params = crops.sample(len(images), torch.Generator().manual_seed(seed))
    ours, native = (crops.apply(images, params, backend=name, **options) for name in ("reference", "native"))
    for got, wanted in zip(ours, native, strict=True):
        assert got.shape == wanted.shape and got.dtype == wanted.dtype
        assert torch.equal(got, wanted), f"{(got != wanted).double().mean():.2%} of the values differ"


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("case", [*CASES, "chain"])
def test_equals_native(case, channels, kernels, poisoned):
    crops = MultiCrop(**SMALL, **({} if case == "chain" else OFF | CASES[case]))
    images = pictures(channels, (61, 83), (120, 40), (28, 28), (32, 32)) * (6 if case == "chain" else 2)
    assert_equals_native(crops, images)


@pytest.mark.parametrize("down_first", [False, True])
@pytest.mark.parametrize("extents", [[(1, 1)], [(1, 50)], [(3000, 20)], [(20, 3000)], [(900, 375)]])
def test_extreme_sizes_in_either_order_of_the_passes(extents, down_first, kernels, poisoned, monkeypatch):
    monkeypatch.setattr(tables, "MAY_GO_DOWN_FIRST", down_first)
    flat = MultiCrop(**SMALL, ratio=(0.1, 0.3))
    for crops in (MultiCrop(**SMALL), flat):
        assert_equals_native(crops, pictures(3, *extents))


@pytest.mark.parametrize("channels", [2, 4, 6, 16])
def test_other_channel_counts(channels, kernels, poisoned):
    assert_equals_native(MultiCrop(**SMALL), pictures(channels, (40, 50), (33, 20)) * 3)


def test_published_sizes(kernels, poisoned):
    assert_equals_native(MultiCrop(), pictures(3, (375, 500), (240, 300), (200, 120)))
    assert len([n for n in kernels.grids if n]) == 6  # every kernel had work


@pytest.mark.parametrize("size", [(3, 1), (1, 700), (700, 1), (90, 91), (91, 90), (200, 1300)])
def test_blurs_of_any_shape(size, kernels, poisoned):
    """Few lines and many in a block, the last block part full, a radius beyond the edges."""
    crops = MultiCrop(global_size=size, local_size=2, n_local=2, blur_p=(1, 1, 1), blur_radius=(1.0, 9.0), grey_p=0.5)
    assert_equals_native(crops, pictures(3, (30, 30), (50, 40)))


def test_every_colour(kernels, poisoned):
    """Jitter of 2^18 colours, in every order of the four steps."""
    levels = np.arange(0, 256, 4)
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij")).reshape(3, 512, 512)
    noise = np.random.default_rng(0).integers(0, 4, grid.shape)
    image = torch.from_numpy((grid + noise).astype(np.uint8))
    only_jitter = OFF | {"jitter_p": 1.0, "jitter": (0.4, 0.4, 0.9, 0.5)}
    crops = MultiCrop(global_size=512, n_local=0, global_scale=(1.0, 1.0), ratio=(1.0, 1.0), **only_jitter)
    seen = crops.sample(12, torch.Generator().manual_seed(0)).order.reshape(-1, 4).unique(dim=0)
    assert len(seen) > 12
    assert_equals_native(crops, [image] * 12)


def test_bfloat16(kernels, poisoned):
    assert_equals_native(MultiCrop(**SMALL), pictures(3, (61, 83), (120, 40)), dtype=torch.bfloat16)


def test_the_order_of_blocks_does_not_matter(kernels, poisoned):
    kernels.backwards = True
    assert_equals_native(MultiCrop(), pictures(3, (175, 200), (90, 120)))


def test_strided_images(kernels):
    whole = pictures(3, (90, 120))[0]
    assert_equals_native(MultiCrop(**SMALL), [whole[:, 10:70, 5:90], whole.transpose(1, 2)])


def test_what_the_kernels_cannot_do_is_refused(kernels):
    images = pictures(3, (20, 30))
    crops = MultiCrop(global_size=(8193, 1), n_local=0, blur_p=(1, 1, 1))
    with pytest.raises(ValueError, match="side of 8193 pixels; 8192 is the most"):
        assert_equals_native(crops, images)
    crops = MultiCrop(global_size=(8193, 1), n_local=0, blur_p=(0, 0, 0))
    assert_equals_native(crops, images)
    params = crops.sample(1, torch.Generator())
    params.jitter[:], params.order[:] = True, 1
    with pytest.raises(ValueError, match="contrast twice"):
        crops.apply(images, params, backend="reference")
