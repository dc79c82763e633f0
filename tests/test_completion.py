from __future__ import annotations

import shutil
import subprocess

import pytest

from dino_fast.cli import completion
from dino_fast.cli.main import main

pytest.importorskip("shtab", reason="the package shtab is not here")


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
@pytest.mark.parametrize(
    "words,expected",
    [
        (["dino-fast", "tr"], "train"),
        (["dino-fast", "eval", "k"], "knn"),
        (["dino-fast", "train", "--out-d"], "--out-dim"),
        (["dino-fast", "train", "--fsdp", "gr"], "grads"),
    ],
)
def test_bash_completes(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    last = len(words) - 1
    program = f"""{script}
COMP_WORDS=({" ".join(words)}); COMP_CWORD={last}; COMP_LINE="{" ".join(words)}"
_shtab_dino_fast dino-fast {words[-1]} {words[-2]}
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, timeout=60)
    assert expected in done.stdout.split(), done.stdout + done.stderr


def test_every_shell_gets_a_script(capsys: pytest.CaptureFixture[str]) -> None:
    for shell in completion.SHELLS:
        assert main(["completion", shell]) == 0
        assert "dino-fast" in capsys.readouterr().out
    assert main(["completion", "fish"]) == 2
    assert "choose from" in capsys.readouterr().err


def test_without_the_package_it_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(__import__("sys").modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert "pip install shtab" in capsys.readouterr().err
