"""Which backend runs on which GPU, and what cannot: GPUs that are not there, of every compute capability."""

from __future__ import annotations

import argparse
import sysconfig
import warnings

import pytest
import torch

from dino_fast import backends, gpu
from dino_fast.backends import EXAMPLES, OPERATIONS, choose
from dino_fast.cli import info
from tests.fake_gpu import CHIPS, fake_gpu

DEVICE = torch.device("cuda:0")
TRITON = ("dino_loss", "linear_dino_loss", "packed_attention")


@pytest.fixture(autouse=True)
def setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DINO_FAST_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize("capability", CHIPS)
def test_info_asks_about_inputs_that_the_operations_take(capability: tuple[int, int], capsys) -> None:
    with fake_gpu(capability):
        assert info.run(argparse.Namespace(json=False)) == 0
    text = capsys.readouterr().out
    for operation in OPERATIONS:
        assert f"{operation} on cpu: " in text and f"{operation} on cuda: " in text
    assert "none can run" not in text


def test_info_under_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    backends.triton_unavailable_reason.cache_clear()
    try:
        found = info.collect()["operations"]
    finally:
        backends.triton_unavailable_reason.cache_clear()
    assert all(found[name]["cpu"]["chosen"] == "triton" for name in TRITON)


@pytest.mark.parametrize("capability", CHIPS)
def test_triton_from_compute_capability_8_on(capability: tuple[int, int]) -> None:
    pytest.importorskip("triton")
    with fake_gpu(capability):
        chosen = {name: choose(name, *EXAMPLES[name](DEVICE)) for name in TRITON}
        if capability >= (8, 0):
            assert set(chosen.values()) == {"triton"}
            return
        assert chosen == {"dino_loss": "reference", "linear_dino_loss": "reference", "packed_attention": "sdpa"}
        for name in TRITON:
            with pytest.raises(backends.BackendError, match=r"capability 8\.0 or newer, this one has 7\.5"):
                choose(name, *EXAMPLES[name](DEVICE), backend="triton")
        qkv = torch.empty((197, 3, 6, 64), dtype=torch.bfloat16, device=DEVICE)
        assert choose("packed_attention", qkv, 197) == "reference"  # no kernel of anybody takes bfloat16 there


@pytest.mark.parametrize("capability", CHIPS)
def test_cuda_kernels_from_compute_capability_8_on(capability, monkeypatch: pytest.MonkeyPatch) -> None:
    from dino_fast import _C

    monkeypatch.setattr(_C, "cuda_version", "12.9")
    with fake_gpu(capability):
        chosen = {name: choose(name, *EXAMPLES[name](DEVICE)) for name in ("multi_tensor", "multi_crop")}
    assert set(chosen.values()) == {"cuda" if capability >= (8, 0) else "reference"}
    with fake_gpu(capability, driver=(11, 8)):
        assert choose("multi_tensor", *EXAMPLES["multi_tensor"](DEVICE)) == "reference"


@pytest.mark.parametrize("capability", [c for c in CHIPS if c >= (8, 0)])
@pytest.mark.parametrize("d", [32, 64, 80, 128])
def test_tiles_of_attention_fit_the_chips_shared_memory(capability: tuple[int, int], d: int) -> None:
    kernels = pytest.importorskip("dino_fast.kernels.packed_attention")
    launched = []
    with pytest.MonkeyPatch.context() as patch, fake_gpu(capability):
        patch.setattr(kernels, "launch_kernel", lambda *arguments, **options: launched.append(options["WAY"]))
        for tokens in (37, 197, 256, 1370):
            qkv = torch.empty((tokens, 3, 2, d), dtype=torch.bfloat16, device=DEVICE)
            ends = torch.empty(2, dtype=torch.int32, device=DEVICE)
            statistics = torch.empty((2, tokens), dtype=torch.float32, device=DEVICE)
            kernels.forward(qkv, ends, tokens, qkv, statistics, statistics)
    # 256 keys and values of 128 elements take 144 KiB.
    whole = "tiles" if d > 64 and CHIPS[capability][0] < 147456 else "whole"
    assert launched == ["short", whole, whole, "tiles"]


@pytest.mark.parametrize("driver, refused", [((12, 4), False), ((13, 0), False), ((11, 8), True), (None, False)])
def test_an_old_driver_is_refused_with_the_reason(driver, refused, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(backends, "_ptxas_version", lambda: "12.9")
    with fake_gpu(driver=driver), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reason = backends.triton_unavailable_reason()
    assert (reason is not None) == refused
    if refused:
        assert "compiled for CUDA 12.9, the driver runs CUDA 11.8 at most" in str(reason)


def test_ptxas_tells_its_version() -> None:
    pytest.importorskip("triton")
    for capability in ((8, 0), (10, 0)):
        with fake_gpu(capability):
            assert int(str(backends._ptxas_version()).split(".")[0]) >= 12


@pytest.mark.parametrize("lacking", ["compiler", "header", "CC"])
def test_without_a_c_compiler_another_backend_runs_and_says_so_once(lacking: str, monkeypatch, tmp_path) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("CC", raising=False)
    if lacking == "header":
        monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    elif lacking == "compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        monkeypatch.setenv("CC", "no-such-compiler")
    with fake_gpu(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        chosen = {name: choose(name, *EXAMPLES[name](DEVICE)) for name in TRITON}
        again = choose("dino_loss", *EXAMPLES["dino_loss"](DEVICE))
    assert chosen["dino_loss"] == again == "reference" and chosen["packed_attention"] == "varlen"
    told = [str(warning.message) for warning in said if "dino_fast" in str(warning.message)]
    assert len(told) == 1 and told[0].startswith("dino_fast runs without its Triton kernels: ")
    assert ("Python.h" if lacking == "header" else "no-such" if lacking == "CC" else "C compiler") in told[0]


def test_limits_of_a_chip_are_the_drivers() -> None:
    with fake_gpu((12, 0)):
        assert gpu.chip(torch.device("cuda")) == gpu.Chip((12, 0), 101376, 170)
    assert gpu.chip(torch.device("cpu")) == gpu.INTERPRETED
