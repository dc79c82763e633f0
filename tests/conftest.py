"""What every test runs with."""

from __future__ import annotations

import os


def pytest_configure() -> None:
    """DINO_FAST_TEST_ISA names the instruction set of the native kernels, of those in `_C.supported_isas()`, as
    .ci/worlds sets it; the tests with the fixture `isa` go through all of them regardless."""
    if name := os.environ.get("DINO_FAST_TEST_ISA"):
        from dino_fast import _C

        _C.set_isa(name)
