"""The choice of a backend: order, environment variable, reasons."""

from __future__ import annotations

import pytest
import torch

from dino_fast import backends
from dino_fast.backends import Backend, BackendError, choose


@pytest.fixture(autouse=True)
def operations(monkeypatch):
    monkeypatch.setattr(backends, "OPERATIONS", {})
    monkeypatch.delenv("DINO_FAST_BACKEND", raising=False)
    nothing = lambda device: ()  # noqa: E731
    no_int = Backend("native", unsupported_reason=lambda *t: "integers" if t and not t[0].is_floating_point() else None)
    backends.register(
        "cross",
        Backend("cuda", unavailable_reason=lambda: "no CUDA device"),
        no_int,
        Backend("reference"),
        example=nothing,
    )
    backends.register("plain", Backend("reference"), example=nothing)


def test_auto_takes_the_first_that_can_run():
    assert choose("cross", torch.zeros(1)) == "native"
    assert choose("cross", torch.zeros(1, dtype=torch.int32)) == "reference"


def test_explicit_choice_is_obeyed_or_refused_with_the_reason():
    assert choose("cross", torch.zeros(1), backend="reference") == "reference"
    with pytest.raises(BackendError, match="no CUDA device"):
        choose("cross", torch.zeros(1), backend="cuda")
    with pytest.raises(BackendError, match="cross has no backend 'trition'; it has: cuda, native, reference"):
        choose("cross", torch.zeros(1), backend="trition")


def test_environment_names_one_backend_for_all_that_have_it(monkeypatch):
    monkeypatch.setenv("DINO_FAST_BACKEND", "native")
    assert choose("cross", torch.zeros(1)) == "native"
    assert choose("plain", torch.zeros(1)) == "reference"  # it has no native backend
    with pytest.raises(BackendError, match="integers"):
        choose("cross", torch.zeros(1, dtype=torch.int32))
    monkeypatch.setenv("DINO_FAST_BACKEND", "nativ")
    with pytest.raises(BackendError, match="no operation has it; there are: cuda, native, reference"):
        choose("plain", torch.zeros(1))


def test_environment_names_backends_by_operation(monkeypatch):
    monkeypatch.setenv("DINO_FAST_BACKEND", "cross=reference")
    assert choose("cross", torch.zeros(1)) == "reference"
    assert choose("cross", torch.zeros(1), backend="native") == "native"  # an argument is nearer than the environment
    monkeypatch.setenv("DINO_FAST_BACKEND", "plain=native")
    with pytest.raises(BackendError, match="plain has no backend 'native'"):
        choose("plain", torch.zeros(1))
    monkeypatch.setenv("DINO_FAST_BACKEND", "crss=native")
    with pytest.raises(BackendError, match="names operation 'crss'"):
        choose("plain", torch.zeros(1))


def test_no_backend_lists_every_reason():
    backends.register(
        "gpu_only", Backend("cuda", unavailable_reason=lambda: "no CUDA device"), example=lambda device: ()
    )
    with pytest.raises(BackendError, match="cuda: no CUDA device"):
        choose("gpu_only", torch.zeros(1))
