"""AddressSanitizer: the operations' tests and the fuzz of test_native.py on a library that sees every access outside
of a buffer, reads too. Slow: it is built first, into build/asan, where the next run finds it.

Not among them: the tests that compile host libraries or kernels of their own (CUDA, `torch.compile`), and those that
measure memory, of which the sanitizer takes its share. An allocation that fails ends a sanitized process instead of
raising, so tests/test_parallel.py is not here either. All of it takes about three minutes of two cores, the build one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytest.importorskip("pybind11")
ROOT = Path(__file__).resolve().parent.parent
TESTS = ("dino_loss", "linear_dino_loss", "matmul", "mlp", "multi_crop", "multi_tensor", "packed_attention")

# Takes the sanitized library for dino_fast._C, then runs the given statement.
PRELUDE = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("dino_fast._C", sys.argv[1])
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
sys.modules["dino_fast._C"] = native
import dino_fast
dino_fast._C = native
"""


def _libraries() -> tuple[Path, Path] | None:
    """AddressSanitizer's run-time library and the C++ library that belongs to it, or None."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return None
    found = []
    for name in ("libasan.so", "libstdc++.so"):
        command = [*compiler.split(), f"-print-file-name={name}"]
        found.append(Path(subprocess.run(command, capture_output=True, text=True).stdout.strip()))
    return (found[0], found[1]) if all(path.is_absolute() for path in found) else None


LIBRARIES = _libraries()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(LIBRARIES is None, reason="the C++ compiler has no AddressSanitizer (libasan.so of GCC)"),
]


@pytest.fixture(scope="module")
def library() -> Path:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", "build/asan"]
    environment = os.environ | {"DINO_FAST_SANITIZE": "address", "DINO_FAST_CUDA": "0"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout[-4000:] + built.stderr[-4000:]
    name = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    (found,) = (ROOT / "build/asan").glob(f"cmake-{sys.implementation.cache_tag}-address/{name}")
    return found


def run(library: Path, statement: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    assert LIBRARIES is not None
    settings = {
        "LD_PRELOAD": ":".join(map(str, LIBRARIES)),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "PYTHONMALLOC": "malloc",
        "OMP_NUM_THREADS": "2",
    }
    command = [sys.executable, "-c", PRELUDE + statement, str(library), *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | settings | environment, capture_output=True, text=True, timeout=900
    )


@pytest.mark.parametrize("write", [False, True], ids=["read", "write"])
def test_it_sees_one_byte_outside(library: Path, write: bool) -> None:
    """A buffer that is a pixel short: the library cannot know, and the sanitizer must."""
    short = run(
        library,
        "import torch\n"
        f"image, planes = torch.zeros(300 - {int(not write)}, dtype=torch.uint8), "
        f"torch.zeros(300 - {int(write)}, dtype=torch.uint8)\n"
        "native.multi_crop_planes(image.data_ptr(), planes.data_ptr(), 100)\n"
        "print('unseen')",
    )
    assert "heap-buffer-overflow" in short.stderr and "unseen" not in short.stdout, short.stdout + short.stderr


def test_functions_by_themselves(library: Path) -> None:
    paths = ["tests/test_native.py"]
    _pytest(library, paths, DINO_FAST_FUZZ_GUARD="0", DINO_FAST_FUZZ_ROUNDS="100")


def test_operations(library: Path) -> None:
    _pytest(library, [f"tests/ops/test_{name}.py" for name in TESTS])


def _pytest(library: Path, paths: list[str], **environment: str) -> None:
    options = [
        "-q",
        "-x",
        "--capture=sys",
        "-p",
        "no:cacheprovider",
        "-k",
        "not compile and not extra_memory",
        "--durations=5",
    ]
    statement = "import pytest\nsys.exit(pytest.main(sys.argv[2:]))"
    tested = run(library, statement, *options, *paths, **environment)
    assert tested.returncode == 0, tested.stdout[-6000:] + tested.stderr[-6000:]
    assert " passed" in tested.stdout
    print(tested.stdout[-1500:])
