"""Checks what the built distributions hold: `python -m tests.wheel_contents DIST_FOLDER`."""

from __future__ import annotations

import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WHEEL_NEEDS = (
    "dino_fast/__init__.py",
    "dino_fast/py.typed",
    "dino_fast/loss.py",
    "dino_fast/optim/adamw_ema.py",
    "dino_fast/kernels/__init__.py",
    "dino_fast/benchmarks/__init__.py",
    "dino_fast/benchmarks/original/__init__.py",
)
SDIST_NEEDS = (
    *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "csrc").rglob("*")) if path.is_file()),
    "kernels/__init__.py",
    "LICENSE",
    "setup.py",
)


def wheel_problems(wheel: Path) -> list[str]:
    """What is missing from the wheel, or in it though it should not be."""
    names = zipfile.ZipFile(wheel).namelist()
    problems = [f"the wheel lacks {name}" for name in WHEEL_NEEDS if name not in names]
    if not any(name.startswith("dino_fast/_C.") and name.endswith(".so") for name in names):
        problems.append("the wheel lacks the compiled module dino_fast/_C")
    if not any(name.startswith("dino_fast/data/") and name.endswith(".parquet") for name in names):
        problems.append("the wheel lacks the demo images")
    tops = {name.split("/")[0] for name in names}
    strangers = {top for top in tops if top != "dino_fast" and not top.endswith(".dist-info")}
    problems += [f"the wheel installs {top} at top level" for top in sorted(strangers)]
    problems += [f"the wheel holds {name}" for name in names if name.endswith((".cpp", ".cu", ".h", ".pyc"))]
    return problems


def sdist_problems(sdist: Path) -> list[str]:
    """What a build from the sdist would miss."""
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    return [f"the sdist lacks {name}" for name in SDIST_NEEDS if name not in names]


def main(folder: Path) -> int:
    wheels, sdists = sorted(folder.glob("*.whl")), sorted(folder.glob("*.tar.gz"))
    if len(wheels) != 1 or len(sdists) != 1:
        print(f"{folder} holds {len(wheels)} wheels and {len(sdists)} sdists; one of each is expected")
        return 1
    problems = wheel_problems(wheels[0]) + sdist_problems(sdists[0])
    print("\n".join(problems) or f"{wheels[0].name} and {sdists[0].name} hold what they should")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
