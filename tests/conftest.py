"""What every test runs with."""

from __future__ import annotations

import os
from importlib.util import find_spec

# Files of tests that cannot even be imported without a library of the extra `test`.
NEEDED = {
    "models/test_export.py": "transformers",
    "models/test_pretrained.py": "transformers",
}
collect_ignore = [file for file, library in NEEDED.items() if find_spec(library) is None]


def pytest_report_header() -> list[str]:
    return [f"tests/{file} left out: no {NEEDED[file]} here" for file in collect_ignore]


def pytest_configure() -> None:
    """DINO_FAST_TEST_ISA names the instruction set of the native kernels, of those in `_C.supported_isas()`, as
    .ci/worlds sets it; the tests with the fixture `isa` go through all of them regardless."""
    if name := os.environ.get("DINO_FAST_TEST_ISA"):
        from dino_fast import _C

        _C.set_isa(name)
