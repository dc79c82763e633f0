from __future__ import annotations

import importlib
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from dino_fast import __version__
from dino_fast.cli import main as cli


def test_the_overview_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"]):
        assert cli.main(words) == 0
        output = capsys.readouterr().out
        for command in cli.COMMANDS:
            assert " ".join(command) in output
    assert cli.main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize("group", ["eval", "data"])
@pytest.mark.parametrize("word", ["-h", "--help"])
def test_a_group_of_commands_has_help(group: str, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([group, word]) == 0
    output = capsys.readouterr().out
    assert f"usage: dino-fast {group}" in output
    for command, (_, summary) in cli.COMMANDS.items():
        assert (" ".join(command) in output and summary in output) == (command[0] == group)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([*command, "--help"])
    assert end.value.code == 0
    assert f"usage: dino-fast {' '.join(command)}" in capsys.readouterr().out


def test_help_and_version_do_not_wait_for_torch() -> None:
    code = (
        "import contextlib, sys\n"
        "from dino_fast.cli import main as cli\n"
        "for words in ([], ['--version'], *([*words, '--help'] for words in cli.COMMANDS)):\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        assert cli.main(words) == 0, words\n"
        "    slow = {'torch', 'numpy', 'PIL', 'pyarrow', 'matplotlib'} & sys.modules.keys()\n"
        "    assert not slow, (words, slow)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["trian"], ["'trian'", "did you mean 'train'"]),
        (["eval", "kn"], ["did you mean 'knn'"]),
        (["eval"], ["needs one of: knn"]),
        (["data"], ["check, preview"]),
        (["train", "--batchsize", "4"], ["no option '--batchsize'", "did you mean '--batch-size'"]),
        (
            ["train", "--bs", "4", "--epoch", "3", "--foo"],
            ["'--bs'; did you mean '--batch-size'?", "'--epochs'", "'--foo'"],
        ),
        (["train", "--std_dev", "4"], ["no option '--std_dev'. 'dino-fast train --help-all' lists all"]),
        (["train", "--batch_size_per_gpu", "4"], ["--batch-size counts the images of all processes"]),
        (["train", "--lr", "0,0005"], ["--lr is '0,0005'; expected a number", "it is 0.0005."]),
        (["train", "--epochs", "2.5"], ["--epochs is '2.5'; expected a whole number."]),
        (["train", "--norm_last_layer", "maybe"], ["'maybe'"]),
        (["eval", "knn", "--checkpoint"], ["expected one argument", "'dino-fast eval knn --help'"]),
        (["train", "--global-size", "48", "32"], ["'32'", "no option before it"]),
        (["train", "--bat=4"], ["no option '--bat'"]),  # no silent abbreviations
        (["train", "--patch-size", "3"], ["--global-size is 28"]),
        (["train", "--data", "no/such/folder"], ["no/such/folder does not exist"]),
        (["eval", "knn", "--checkpoint", "no.pth", "--data", "demo"], ["no.pth does not exist; give a run directory"]),
        (["data", "check", "demo", "--limit", "0"], ["--limit is 0", "1 or more"]),
        (["data", "check", "demo", "--workers", "0"], ["--workers is 0", "1 or more"]),
        (["train", "--preset", "big"], ["no preset 'big'", "demo"]),
    ],
)
def test_mistakes_get_a_sentence(
    words: list[str],
    parts: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("dino-fast: ")
    assert "Traceback" not in error and "usage:" not in error and len(error.splitlines()) < 8
    for part in parts:
        assert part in error
    assert not list(tmp_path.iterdir())  # nothing was begun


def test_a_tilde_behind_an_equals_sign_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    given = []
    monkeypatch.setattr("dino_fast.cli.train.run", lambda args: given.append(args))
    cli.main(["train", "--out=~/x", "--data=a~b"])
    assert (given[0].out, given[0].data) == (str(tmp_path / "x"), "a~b")


def test_a_command_line_of_main_dino_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    from dino_fast.engine.config import from_arguments

    given = []
    monkeypatch.setattr("dino_fast.cli.train.run", lambda args: given.append(from_arguments(args)))
    words = (
        "--arch vit_small --patch_size 8 --out_dim 1000 --norm_last_layer false --momentum_teacher 0.99 "
        "--use_bn_in_head False --warmup_teacher_temp 0.03 --teacher_temp 0.07 --warmup_teacher_temp_epochs 5 "
        "--use_fp16 true --weight_decay 0.05 --weight_decay_end 0.3 --clip_grad 0.5 --epochs 20 --freeze_last_layer 2 "
        "--lr 0.001 --warmup_epochs 3 --min_lr 2e-6 --optimizer lars --drop_path_rate 0.2 "
        "--global_crops_scale 0.3 1. --local_crops_number 6 --local_crops_scale 0.1 0.3 --data_path /photos "
        "--output_dir /run --saveckp_freq 7 --seed 3 --num_workers 2"
    )
    cli.main(["train", *words.split()])
    config = given[0]
    assert (config.patch_size, config.norm_last_layer, config.head_bn, config.precision) == (8, False, False, "fp16")
    assert (config.data, config.out, config.save_every, config.local_crops) == ("/photos", "/run", 7, 6)
    assert (config.global_scale, config.momentum_teacher, config.workers) == ((0.3, 1.0), 0.99, 2)
    cli.main(["train", "--data", "x", "--use_fp16=false", "--norm_last_layer", "true"])
    assert (given[1].precision, given[1].norm_last_layer) == ("fp32", True)


def test_underscores_are_hyphens_in_every_command(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setattr("dino_fast.cli.eval_knn.run", given.append)
    cli.main(["eval", "knn", "--checkpoint", "a_b", "--data", "c_d", "--image_size", "32", "--batch_size=8"])
    assert (given[0].checkpoint, given[0].data, given[0].image_size, given[0].batch_size) == ("a_b", "c_d", 32, 8)


@pytest.mark.parametrize("option", ["--help", "--help-all"])
def test_help_of_train_fits_80_columns(option: str, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        cli.main(["train", option])
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines())) <= 80
    assert output.index("most used:") < output.index("--epochs N")
    assert ("loss and teacher:" in output) == (option == "--help-all")


def test_our_warnings_are_notes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    info = importlib.import_module("dino_fast.cli.info")
    monkeypatch.setattr(info, "run", lambda args: warnings.warn_explicit("damaged", UserWarning, info.__file__, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda *told: sys.stderr.write(warnings.formatwarning(*told[:4]))
        assert cli.main(["info"]) == 0
    assert capsys.readouterr().err == "dino-fast: note: damaged\n"


def test_a_signal_becomes_an_exit_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from dino_fast.engine import trainer as loop

    def interrupted(config: object) -> None:
        raise loop.Interrupted(15, "interrupted at step 3 and saved")

    monkeypatch.setattr(loop, "train", interrupted)
    assert cli.main(["train"]) == 143
    assert "interrupted at step 3" in capsys.readouterr().err


def test_train_then_evaluate_then_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert cli.main(["train", "--max-steps", "3", "--out", str(run), "--knn-images", "200", "--device", "cpu"]) == 0
    output = capsys.readouterr().out
    assert "dino-fast eval knn --checkpoint" in output
    assert cli.main(["eval", "knn", "--checkpoint", str(run), "--data", "demo", "--json"]) == 0
    assert '"top1"' in capsys.readouterr().out
    assert cli.main(["export", "--checkpoint", str(run), "--out", str(tmp_path / "vit.safetensors")]) == 0
    assert (tmp_path / "vit.safetensors").read_bytes() == (run / "export" / "teacher.safetensors").read_bytes()


@pytest.mark.parametrize(
    "door", ["from dino_fast import train", "from dino_fast.cli.main import main; main(['info', '--json'])"]
)
def test_every_door_shortens_the_spinning_of_openmp(door):
    script = f"import os, sys; {door}; print(os.environ.get('GOMP_SPINCOUNT'), file=sys.stderr)"
    plain = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    for given, expected in (({}, "4000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "None")):
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, env=plain | given, capture_output=True, text=True, check=True)
        assert done.stderr.split()[-1] == expected
