from __future__ import annotations

import re
from pathlib import Path

import pytest

import dino_fast
from dino_fast.atomic import atomic_write


def test_a_file_appears_whole_or_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "page.html"
    with atomic_write(path) as temporary:
        temporary.write_text("first")
        assert not path.exists() and temporary.parent == path.parent and temporary.suffix == ".html"
    assert path.read_text() == "first"
    with pytest.raises(RuntimeError, match="stop"), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("stop")
    assert path.read_text() == "first"
    with pytest.raises(FileNotFoundError), atomic_write(path):
        pass  # nothing was written
    assert [file.name for file in path.parent.iterdir()] == ["page.html"]


def test_no_file_is_replaced_by_hand() -> None:
    """A folder is renamed by its own code (a checkpoint, an export of several files), a file by `atomic_write`.

    The flat copy of Parquet files is a cache of many GB, whose size is checked when it is read. checkpoints/best is a
    symbolic link.
    """
    package = Path(dino_fast.__file__).parent
    found = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if path.parts[len(package.parts)] not in ("kernels", "benchmarks")
        and re.search(r"os\.replace\(|temporary\.replace\(", path.read_text())
    }
    assert found - {"data/formats/parquet.py", "engine/checkpoint.py"} == {"atomic.py"}
