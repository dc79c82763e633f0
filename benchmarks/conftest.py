"""`pytest benchmarks --benchmark-enable`: each contender of each quick comparison as a pytest-benchmark."""

from __future__ import annotations

from typing import Any


def pytest_generate_tests(metafunc: Any) -> None:
    """Parametrises `test_speed(benchmark, contender)` over the module's `comparisons(quick=True)`."""
    if "contender" not in metafunc.fixturenames:
        return
    found = [(comparison, c) for comparison in metafunc.module.comparisons(quick=True) for c in comparison.contenders]
    present = [(comparison, c) for comparison, c in found if not c.absent]
    names = [f"{comparison.shape}-{comparison.dtype}-{c.name}".replace(" ", "_") for comparison, c in present]
    metafunc.parametrize("contender", [c for _, c in present], ids=names)
