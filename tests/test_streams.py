from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dino_fast.cli import main as cli
from dino_fast.data.index_cache import cache_folder
from dino_fast.streams import LastingStream


def test_characters_that_the_encoding_lacks_are_escaped() -> None:
    raw = io.BytesIO()
    stream = LastingStream(io.TextIOWrapper(raw, encoding="ascii"))
    assert stream.write("caf\u00e9 \udcff") == 6
    stream.flush()
    assert raw.getvalue() == b"caf\\xe9 \\udcff" and stream.error is None


def test_the_first_failure_is_kept_and_a_reader_that_left_is_none() -> None:
    with open("/dev/full", "w") as full:
        stream = LastingStream(full)
        stream.write("x")
        stream.flush()
        stream.write("y")
        stream.flush()  # to the null device
        assert isinstance(stream.error, OSError) and "No space" in str(stream.error)
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as broken:
        stream = LastingStream(broken)
        stream.write("x")
        stream.flush()
        assert stream.error is None
    assert LastingStream(None).write("x") == 1 and not LastingStream(None).isatty()


@pytest.mark.parametrize(("redirection", "status"), [("| true", 0), (">/dev/full", 1), (">&-", 0)])
def test_the_exit_status_of_a_command_that_prints(redirection: str, status: int) -> None:
    command = f"{sys.executable} -m dino_fast --help {redirection}"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=100)
    assert done.returncode == status
    assert done.stderr == "" or ("No space left on device" in done.stderr.strip() and done.stderr.count("\n") == 1)


def test_a_user_without_home_and_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import pwd

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "XDG_CACHE_HOME", "DINO_FAST_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert cache_folder() == tmp_path / f"dino-fast-{os.getuid()}"
    assert cli.main(["--version"]) == 0
    assert os.environ.pop("USER") == str(os.getuid())
