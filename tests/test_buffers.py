"""Every buffer in the package says its dtype and its device, so that no default of the caller's changes a result.

A buffer of the default dtype is a fault that shows only in programs that change it: native code that writes float32
through its pointer then writes past its end.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import dino_fast
import dino_fast.kernels

# The functions of torch that take their dtype or device from the defaults.
MAKERS = {
    "arange", "as_tensor", "asarray", "bartlett_window", "blackman_window", "empty", "empty_permuted", "empty_strided",
    "eye", "full", "hamming_window", "hann_window", "kaiser_window", "linspace", "logspace", "ones", "rand", "randint",
    "randn", "randperm", "range", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros",
}  # fmt: skip
ROOTS = [Path(dino_fast.__file__).parent, Path(dino_fast.kernels.__file__).parent]


def unstated(source: str) -> list[str]:
    """The calls in `source` that make a tensor without saying dtype and device, as "LINE: call lacks ..."."""
    found, tree = [], ast.parse(source)
    parameters = {
        id(argument)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "Parameter"
        for argument in node.args
    }
    for node in ast.walk(tree):
        if id(node) in parameters:  # a module's weights follow the defaults, as those of torch.nn do
            continue
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MAKERS):
            continue
        if not (isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"):
            continue
        given = {keyword.arg for keyword in node.keywords}
        lacking = sorted({"dtype", "device"} - given)
        if lacking and None not in given:  # None: **options, which may bring both
            found.append(f"{node.lineno}: torch.{node.func.attr} lacks {' and '.join(lacking)}")
    return found


def test_the_lint_finds_them() -> None:
    assert unstated("import torch\nx = torch.empty(3)") == ["2: torch.empty lacks device and dtype"]
    assert unstated("class M(nn.Module):\n w = nn.Parameter(torch.ones(3)); b = torch.ones(3)")[0].startswith("2:")
    assert unstated("torch.zeros(3, dtype=torch.float32)") == ["1: torch.zeros lacks device"]
    assert unstated("torch.tensor([1.0], dtype=d, device=x.device); x.new_empty(3); torch.zeros_like(x)") == []


@pytest.mark.parametrize("root", ROOTS, ids=lambda root: root.name)
def test_every_buffer_says_its_dtype_and_device(root: Path) -> None:
    found = [
        f"{path.relative_to(root.parent)}:{line}"
        for path in sorted(root.rglob("*.py"))
        for line in unstated(path.read_text())
    ]
    assert not found, "\n".join(found)
