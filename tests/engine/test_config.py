from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from dino_fast.engine.config import (
    ALIASES,
    GROUPS,
    MOST_USED,
    Config,
    add_arguments,
    build_config,
    check_same,
    from_arguments,
    load_config,
    to_dict,
    with_whole_paths,
)
from dino_fast.engine.presets import PRESETS
from dino_fast.errors import UserError


def _parse(*words: str) -> Config:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(parser)
    return from_arguments(parser.parse_args(words))


def test_the_documented_options_exist() -> None:
    line = (
        "--preset demo --data demo --out x --arch vit_small --patch-size 4 --epochs 3 --max-steps 5 --batch-size 8 "
        "--out-dim 64 --local-crops 1 --global-size 28 --local-size 12 --seed 3 --workers 0 --device cpu "
        "--precision bf16 --resume"
    )
    config = _parse(*line.split())
    assert (config.arch, config.patch_size, config.epochs, config.max_steps, config.batch_size) == (
        "vit_small", 4, 3, 5, 8,
    )  # fmt: skip
    assert (config.out_dim, config.local_crops, config.global_size, config.local_size) == (64, 1, 28, 12)
    assert (config.seed, config.device, config.precision, config.resume, config.out) == (3, "cpu", "bf16", True, "x")


def test_every_field_is_an_option() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    known = {action.dest for action in parser._actions}
    assert set(Config.__dataclass_fields__) <= known


def test_later_layers_win(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("epochs: 7\nlr: 1e-3\nglobal_scale: [0.5, 1]\n")
    config = _parse("--preset", "vit_small_boost", "--data", "photos", "--config", str(file), "--epochs", "9")
    assert (config.epochs, config.lr, config.global_scale) == (9, 1e-3, (0.5, 1.0))
    assert config.warmup_teacher_temp_epochs == 30  # of the preset
    assert config.weight_decay == 0.04  # the default


def test_the_demo_is_what_nothing_asks_for() -> None:
    assert _parse() == build_config(preset="demo")
    assert _parse("--data", "demo").embed_dim == PRESETS["demo"]["embed_dim"]
    photos = _parse("--data", "photos")
    assert (photos.arch, photos.embed_dim, photos.out_dim, photos.lr) == ("vit_small", None, 65536, 0.0005)


def test_the_originals_names_of_architectures(tmp_path: Path) -> None:
    assert _parse("--data", "photos", "--arch", "resnet50").arch == "torchvision/resnet50"
    assert _parse("--data", "photos", "--arch", "deit_small").arch == "vit_small"
    file = tmp_path / "c.yaml"
    file.write_text("data: photos\narch: deit_tiny\n")
    assert _parse("--config", str(file)).arch == "vit_tiny"


def test_another_architecture_brings_its_own_sizes() -> None:
    assert _parse("--arch", "vit_small").embed_dim is None
    assert _parse("--arch", "vit_small", "--depth", "2").depth == 2


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_survive_a_file(name: str, tmp_path: Path) -> None:
    import yaml

    config = build_config({"data": "photos"}, preset=name)
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in to_dict(config).items()}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(plain))
    assert load_config(tmp_path / "config.yaml") == config


def test_published_recipes() -> None:
    small, boost, base = (
        build_config({"data": "x"}, preset=f"vit_{n}") for n in ("small_100ep", "small_boost", "base")
    )
    assert (small.lr, small.warmup_epochs, small.min_lr, small.momentum_teacher, small.clip_grad) == (
        5e-4,
        10,
        1e-6,
        0.996,
        3,
    )
    assert (small.weight_decay, small.weight_decay_end, small.freeze_last_layer, small.epochs) == (0.04, 0.4, 1, 100)
    assert (boost.epochs, boost.teacher_temp, boost.warmup_teacher_temp_epochs) == (300, 0.07, 30)
    assert not boost.norm_last_layer
    assert (base.arch, base.out_dim, base.norm_last_layer) == ("vit_base", 65536, True)
    assert (base.epochs, base.batch_size, base.lr, base.min_lr, base.clip_grad) == (400, 32 * 32, 0.00075, 2e-6, 0.3)
    assert (base.warmup_teacher_temp, base.teacher_temp, base.warmup_teacher_temp_epochs) == (0.04, 0.07, 50)
    assert (base.global_scale, base.local_scale, base.local_crops) == ((0.25, 1.0), (0.05, 0.25), 10)
    assert (base.freeze_last_layer, base.warmup_epochs, base.momentum_teacher, base.drop_path_rate) == (
        3,
        10,
        0.996,
        0.1,
    )
    assert (small.batch_size, boost.batch_size, boost.local_crops) == (8 * 64, 16 * 64, 8)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("batchsize: 64", ["batchsize", "did you mean 'batch_size'"]),
        ("batch_size: many", ["batch_size is 'many'", "a whole number"]),
        ("batch_size: 1.5", ["a whole number"]),
        ("batch_size: true", ["a whole number"]),
        ("lr: fast", ["lr is 'fast'", "a number"]),
        ("head_bn: 1", ["true or false"]),
        ("global_scale: [0.4]", ["a list of 2 numbers"]),
        ("arch: 3", ["arch is 3", "text"]),
        ("epochs: null", ["epochs is None", "a whole number"]),
        ("- 1", ["batch_size: 64"]),
        ("a: [", ["not valid YAML"]),
    ],
)
def test_a_wrong_file_is_told_what_is_right(tmp_path: Path, text: str, parts: list[str]) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        build_config({"data": "x"}, file=file)
    assert str(file) in str(error.value)
    for part in parts:
        assert part in str(error.value)


def test_a_missing_file_and_an_unknown_preset() -> None:
    with pytest.raises(UserError, match=r"absent\.yaml"):
        build_config(file="absent.yaml")
    with pytest.raises(UserError, match="did you mean 'vit_base'"):
        build_config(preset="vit_bas")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"global_size": 30}, "--global-size is 30, which patches of 16 do not tile; give 16 or 32"),
        ({"local_size": 8}, "--local-size is 8.*give 16"),
        ({"epochs": 0}, "--epochs is 0; it must be 1 or more"),
        ({"teacher_temp": 0.0}, "--teacher-temp is 0.0; it must be above 0"),
        ({"momentum_teacher": 1.5}, "--momentum-teacher is 1.5; it must be between 0 and 1"),
        ({"lr": float("nan")}, "--lr is nan"),
        ({"weight_decay": -1}, "--weight-decay"),
        ({"grad_accum_steps": 3}, "--grad-accum-steps 3 does not divide --batch-size 64"),
        ({"global_scale": (1.0, 0.4)}, "--global-scale is 1.0 0.4"),
        ({"local_scale": (0.0, 0.4)}, "--local-scale"),
        ({"precision": "fp8"}, "--precision is 'fp8'.*Accepted: auto, fp32"),
        ({"device": "gpu"}, "--device is 'gpu'.*Accepted: auto, cpu, cuda"),
        ({"embed_dim": 65, "num_heads": 2}, "--embed-dim 65 is not a multiple of --num-heads 2"),
        ({"drop_path_rate": 1.0}, "--drop-path-rate"),
        ({"channels": 4}, "--channels is 4; it must be 1 or 3"),
    ],
)
def test_what_cannot_work_is_refused_at_once(given: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_config({"data": "photos", **given})


def test_local_size_is_free_without_local_crops() -> None:
    assert build_config({"data": "photos", "local_crops": 0, "local_size": 7}).local_size == 7


def test_resuming_starts_from_the_runs_settings(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("data: photos\nbatch_size: 16\nepochs: 3\n")
    config = build_config({"out": str(tmp_path), "resume": True, "workers": 2})
    assert (config.data, config.batch_size, config.epochs, config.workers) == ("photos", 16, 3, 2)
    assert build_config({"out": str(tmp_path / "new"), "resume": True, "data": "demo"}).out_dim == 512


def test_resuming_where_no_run_is_needs_data(tmp_path: Path) -> None:
    run = tmp_path / "flowers"
    (run / "checkpoints" / "step-00000004").mkdir(parents=True)
    (run / "config.yaml").write_text("data: photos\n")
    (tmp_path / "lost" / "checkpoints" / "step-00000004").mkdir(parents=True)
    for out, hint in {
        tmp_path / "flower": "did you mean 'flowers'",
        run / "checkpoints": f"it lies in the run {run}: give that",
        run / "checkpoints" / "step-00000004": f"it lies in the run {run}: give that",
        tmp_path / "lost": "its config.yaml is missing",
    }.items():
        for preset in (None, "vit_small"):
            with pytest.raises(UserError, match=rf"no run in {out};.*{hint}.*--data"):
                build_config({"out": str(out), "resume": True}, preset=preset)
    assert build_config({"out": str(tmp_path / "new"), "resume": True, "data": "photos"}).data == "photos"


@pytest.mark.parametrize("name", ["data", "out", "init_from", "wandb"])
def test_an_empty_path_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="is empty"):
        build_config({"data": "photos", name: ""})


def test_paths_mean_the_same_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "photos").mkdir()
    (tmp_path / "home").mkdir()

    def whole(**given: str) -> Config:
        return with_whole_paths(build_config({"data": "x", **given}))

    config = whole(data="photos", init_from="photos", out="~/run")
    assert config.data == config.init_from == str(tmp_path / "photos") and config.out == str(tmp_path / "home" / "run")
    assert whole(data="~/photos").data == str(tmp_path / "home" / "photos")
    assert whole(data="photos/*.jpg").data == str(tmp_path / "photos" / "*.jpg")
    assert whole(data="{00..09}.tar").data == str(tmp_path / "{00..09}.tar")
    for name in ("demo", "elsewhere"):
        assert whole(data=name).data == name
    assert whole(init_from="hub:dino_vits16").init_from == "hub:dino_vits16"
    with pytest.raises(UserError, match="no such home folder"):
        whole(out="~nobody-of-that-name/run")


def test_resuming_with_other_settings_is_named() -> None:
    before = build_config({"data": "x"})
    with pytest.raises(UserError, match=r"arch 'vit_small' -> 'vit_base'.*out_dim 65536 -> 64"):
        check_same(before, build_config({"data": "x", "arch": "vit_base", "out_dim": 64}))
    check_same(before, build_config({"data": "y", "max_steps": 9, "workers": 4, "knn_every": 0}))


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys\nfrom dino_fast.cli import main as cli\n"
        "try:\n    cli.main(['train', '--help'])\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--batch-size" in done.stdout


@pytest.mark.parametrize("alias", ALIASES)
def test_other_names_of_settings_are_accepted(alias: str, tmp_path: Path) -> None:
    import yaml

    name = ALIASES[alias]
    assert alias not in Config.__dataclass_fields__ and name in Config.__dataclass_fields__
    values = {
        "momentum": 0.9, "heads": 2, "accumulate": 2, "shard": "full", "last_layer": "parts", "keep": 5, "max_bad": 0.2,
        "teacher": "copy", "grey_p": 0.3, "data_path": "photos", "output_dir": "x", "num_workers": 3,
        "use_bn_in_head": True, "local_crops_number": 4, "global_crops_scale": [0.3, 1.0], "saveckp_freq": 20,
        "local_crops_scale": [0.05, 0.3], "use_fp16": True,
    }  # fmt: skip
    value = values[alias]
    present = {"last_layer": "chunked", "saveckp_freq": 20.0, "use_fp16": "fp16"}.get(
        alias, tuple(value) if isinstance(value, list) else value
    )
    base: dict[str, object] = {"data": "x", "hold_out": 0.0} if name != "data" else {}
    expected = build_config({**base, name: present})
    assert getattr(expected, name) == present != getattr(Config(), name)
    assert build_config({**base, alias: value}) == expected
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**base, alias: value}))
    assert load_config(tmp_path / "config.yaml") == build_config({**base, alias: value}, preset=None) or name == "data"
    words = (
        []
        if value is True and alias != "use_fp16"
        else [str(x) for x in (value if isinstance(value, list) else [value])]
    )
    data = ["--data", "x"] if name != "data" else []
    for flag in (f"--{alias}", "--" + alias.replace("_", "-")):
        assert _parse(*data, flag, *words) == expected


def test_two_names_of_one_setting_are_refused() -> None:
    with pytest.raises(UserError, match=r"--momentum.* is given twice: it is another name of 'momentum_teacher'"):
        build_config({"momentum_teacher": 0.9, "momentum": 0.9})


def test_a_mistyped_option_is_answered_with_the_present_name() -> None:
    with pytest.raises(UserError, match="did you mean 'momentum_teacher'"):
        build_config({"momentum_teachr": 0.9})


def test_help_shows_the_most_used_first_and_help_all_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    def help_of(word: str) -> str:
        with pytest.raises(SystemExit):
            _parse(word)
        return capsys.readouterr().out

    short, whole = help_of("--help"), help_of("--help-all")
    flags = {name: "--" + name.replace("_", "-") for name in Config.__dataclass_fields__}
    body = whole.partition("most used:")[2]
    for name, flag in flags.items():
        assert (f"  {flag}" in short.partition("most used:")[2]) == (name in MOST_USED), name
        assert body.count(f"\n  {flag} ") + body.count(f"\n  {flag},") + body.count(f"\n  {flag}\n") == 1, name
    assert len(MOST_USED) + 1 == 12  # with --preset
    titles = ["most used", *GROUPS.values()]
    places = [whole.index(f"\n{title}:\n") for title in titles]
    assert places == sorted(places)
    assert "--momentum " not in whole and "saveckp" not in whole and "_crops" not in whole.replace("global_crops", "")
