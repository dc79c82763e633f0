"""Every kernel is launched on the device of its tensors, whichever is current: two GPUs that are not there show it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from dino_fast.augment import MultiCrop
from dino_fast.ops import multi_crop
from dino_fast.ops.multi_crop import cuda as multi_crop_cuda
from dino_fast.ops.multi_tensor import cuda as multi_tensor_cuda
from tests.fake_gpu import FakeDevice, fake_gpu
from tests.ops import test_multi_crop_on_host as crops_on_host
from tests.ops import test_multi_tensor_on_host as tensors_on_host

KERNELS = Path(__file__).parents[2] / "kernels"


def test_triton_kernels_are_launched_in_one_place() -> None:
    """`kernel[grid](...)` stands in kernels/launch.py alone."""
    found = []
    for file in sorted(KERNELS.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                found.append(file.name)
    assert found == ["launch.py"]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Every Triton launch: the kernel and the device that was current. Nothing is compiled."""
    jit = pytest.importorskip("triton").runtime.jit.JITFunction
    seen: list[tuple[str, int]] = []

    def launcher(kernel, grid):
        def launched(*arguments, enable_fp_fusion, **options):
            assert enable_fp_fusion  # said, since Triton's default is not the same in all versions
            seen.append((kernel.fn.__name__, FakeDevice.current))

        return launched

    monkeypatch.setattr(jit, "__getitem__", launcher)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_launches_are_on_the_tensors_device(launches: list[tuple[str, int]], dtype: torch.dtype) -> None:
    from dino_fast.kernels import dino_loss, linear_dino_loss, packed_attention

    with fake_gpu():
        other = torch.device("cuda:1")
        V, B, K, D = 10, 4, 2048, 256

        def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=other)

        wide = torch.float32
        student, teacher, center = empty(V, B, K), empty(2, B, K), empty(K, dtype=wide)
        statistics = empty(2, V + 2, B, dtype=wide)
        dino_loss.statistics(student, teacher, center, 0.1, 0.04, statistics)
        dino_loss.gradient(student, teacher, center, statistics, empty(dtype=wide), empty(V, B, K), 0.1, 0.04)
        dino_loss.mean(student, teacher, center, statistics)
        rows, targets = empty(V, B, D), empty(2, B, D)
        layers = [
            linear_dino_loss.Layer(empty(K, D), empty(K, dtype=wide), row) for row in (None, empty(D, dtype=wide))
        ]
        temps = (0.1, 0.04)
        linear_dino_loss.attend(rows, layers[0], targets, layers[1], center, *temps, wanted=True)
        factors = empty(V, B, dtype=wide), empty(2, V, B, dtype=wide)
        linear_dino_loss.weight_gradient(rows, layers[0], targets, layers[1], center, statistics, *factors, *temps)
        qkv, ends = empty(100, 3, 6, 64), torch.empty(5, dtype=torch.int32, device=other)
        out, maxima, sums = empty(100, 6, 64), empty(6, 100, dtype=wide), empty(6, 100, dtype=wide)
        packed_attention.forward(qkv, ends, 37, out, maxima, sums)
        packed_attention.backward(empty(100, 6, 64), qkv, ends, 37, out, maxima, sums, empty(100, 3, 6, 64))
    assert {name for name, _ in launches} >= {
        "_statistics", "_merge", "_gradient", "_columns", "_attend", "_weigh", "_forward",
        "_backward",
    }  # fmt: skip
    assert [launch for launch in launches if launch[1] != 1] == []


def test_inputs_on_two_devices_are_refused(launches: list[tuple[str, int]]) -> None:
    from dino_fast.kernels import dino_loss

    with fake_gpu(), pytest.raises(ValueError, match="on cuda:0 and cuda:1; move them to one device"):
        logits = torch.empty(2, 4, 8, device="cuda:1")
        center, statistics = torch.empty(8, device="cuda:0"), torch.empty(2, 4, 4, device="cuda:1")
        dino_loss.mean(logits, logits, center, statistics)
    assert launches == []


class Guard:
    """Stands for `on_device`, and for the kernels' module: its launches count themselves, inside the guard or not."""

    def __init__(self, kernels: object) -> None:
        self.kernels, self.depth = kernels, 0
        self.inside: list[str] = []
        self.outside: list[str] = []

    def __call__(self, device: torch.device) -> Guard:
        return self

    def __enter__(self) -> None:
        self.depth += 1

    def __exit__(self, *error: object) -> None:
        self.depth -= 1

    def __getattr__(self, name: str) -> object:
        value = getattr(self.kernels, name)
        if not callable(value) or name.endswith(("_offsets", "_table")):
            return value

        def run(*arguments: object) -> object:
            (self.inside if self.depth else self.outside).append(name)
            return value(*arguments)

        return run


tensor_library = tensors_on_host.library
crop_library = crops_on_host.library


def test_optimizer_launches_are_guarded(tensor_library, monkeypatch: pytest.MonkeyPatch) -> None:
    guard = Guard(tensors_on_host.HostKernels(tensor_library))
    monkeypatch.setattr(multi_tensor_cuda, "_plans", type(multi_tensor_cuda._plans)())
    monkeypatch.setattr(multi_tensor_cuda, "_kernels", lambda: guard)
    monkeypatch.setattr(multi_tensor_cuda, "on_device", guard)
    monkeypatch.setattr(multi_tensor_cuda, "_stream", lambda tensor: 0)
    monkeypatch.setattr(multi_tensor_cuda, "_capturing", lambda tensor: False)
    lists = [[torch.rand(n) for n in (3, 9000)] for _ in range(5)]
    steps = [torch.zeros(()) for _ in lists[0]]
    multi_tensor_cuda.ema_update(lists[0], lists[1], 0.9, [])
    multi_tensor_cuda.grad_norms(lists[1])
    numbers = ([1e-3] * 2, [0.0] * 2, 0.9, 0.999, 1e-8, 0.99)
    multi_tensor_cuda.adamw_ema(*lists[:4], steps, lists[4], [], [], None, None, *numbers)
    assert guard.outside == [] and len(set(guard.inside)) == 5, guard.inside


def test_crop_launches_are_guarded(crop_library, monkeypatch: pytest.MonkeyPatch) -> None:
    guard = Guard(crops_on_host.HostKernels(crop_library))
    monkeypatch.setattr(multi_crop_cuda, "_kernels", lambda: guard)
    monkeypatch.setattr(multi_crop_cuda, "on_device", guard)
    monkeypatch.setattr(multi_crop_cuda, "_stream", lambda tensor: 0)
    monkeypatch.setitem(multi_crop._RUN, "reference", multi_crop_cuda.multi_crop)
    crops = MultiCrop(**crops_on_host.SMALL)
    images = [torch.zeros((3, 60, 60), dtype=torch.uint8)]
    crops.apply(images, crops.sample(1, torch.Generator().manual_seed(0)), backend="reference")
    assert guard.outside == [] and guard.inside == ["cuda_multi_crop"]
