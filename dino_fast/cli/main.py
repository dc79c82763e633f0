"""The command line: `dino-fast COMMAND [options]`. Only the module of the command that is called is imported."""

from __future__ import annotations

import argparse
import difflib
import getpass
import importlib
import os
import re
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from dino_fast import __version__
from dino_fast.cpus import shorten_spinning
from dino_fast.errors import UserError, nearest
from dino_fast.streams import lasting_streams

# Words of a command -> (module with `add_arguments(parser)` and `run(args)`, what the command does).
# Those modules import nothing slow: `--help` needs their options only.
COMMANDS = {
    ("train",): ("dino_fast.cli.train", "pretrain a vision transformer on images without labels"),
    ("eval", "knn"): ("dino_fast.cli.eval_knn", "classify held-out images by their nearest neighbours' labels"),
    ("eval", "linear"): ("dino_fast.cli.eval_linear", "classify them with a linear layer on frozen features"),
    ("eval", "finetune"): ("dino_fast.cli.eval_finetune", "train the whole network with labels and classify them"),
    ("eval", "attention"): ("dino_fast.cli.eval_attention", "draw what the class token attends to"),
    ("eval", "segment"): ("dino_fast.cli.eval_segment", "compare the attention's masks with true masks"),
    ("eval", "video"): ("dino_fast.cli.eval_video", "carry objects' masks through videos by patch similarity"),
    ("eval", "retrieval"): ("dino_fast.cli.eval_retrieval", "search a database of images with queries"),
    ("eval", "copy"): ("dino_fast.cli.eval_copy", "find the originals of distorted copies"),
    ("runs",): ("dino_fast.cli.runs", "list and compare runs, with a plot of their curves"),
    ("report",): ("dino_fast.cli.report", "write a page about a run: curves, attention, neighbours, settings"),
    ("embed",): ("dino_fast.cli.embed", "write the features of images to Parquet, .npy or .csv"),
    ("export",): (
        "dino_fast.cli.export",
        "write a checkpoint's backbone for timm, torch.hub, transformers, ONNX or torch.export",
    ),
    ("data", "check"): ("dino_fast.cli.data_check", "read every image and list those that cannot be used"),
    ("data", "preview"): ("dino_fast.cli.data_preview", "draw the crops that training would see"),
    ("bench",): ("dino_fast.benchmarks.command", "time the operations beside what else there is"),
    ("info",): ("dino_fast.cli.info", "versions, devices, and which implementation of each operation runs here"),
    ("completion",): ("dino_fast.cli.completion", "print the script with which a shell completes dino-fast's words"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit status.

    0; 1 where the results could not be printed; 2 for what the user can correct; 128 + its number for a signal.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    with lasting_streams() as output:
        _name_user()
        status = _status(words)
        output.flush()
        if output.error is None or status or words[:1] == ["train"]:  # whose results are in its directory
            return status
        print(f"dino-fast: the output could not be written ({output.error}): it is not complete", file=sys.stderr)
        return 1


def _name_user() -> None:
    """A user without a name (`docker run --user 12345`) gets a number as one: torch.compile names its cache by it."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = str(os.getuid())


def _status(words: list[str]) -> int:
    plain, warnings.formatwarning = warnings.formatwarning, _note
    try:
        return _run(words)
    except UserError as error:
        print(f"dino-fast: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"dino-fast: {stop or 'interrupted'}", file=sys.stderr)
        return getattr(stop, "code", 130)
    finally:
        warnings.formatwarning = plain


def _note(message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
    """Our own warnings are written for the person at the terminal, who needs no line of code."""
    if Path(filename).is_relative_to(Path(__file__).parents[1]):
        return f"dino-fast: note: {message}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    group = [command for command in COMMANDS if len(command) == 2 and command[0] == words[0]]
    if group and words[1:2] in (["-h"], ["--help"], ["help"]):
        print("\n".join([f"usage: dino-fast {words[0]} COMMAND [options]", "", *_summaries(group)]))
        return 0
    if words[0] in ("-V", "--version"):
        print(f"dino-fast {__version__}")
        return 0
    command, rest = _command(words)
    module_name, summary = COMMANDS[command]
    module = importlib.import_module(module_name)
    parser = Parser(prog=" ".join(("dino-fast", *command)), description=summary, allow_abbrev=False)
    module.add_arguments(parser)
    args, unknown = parser.parse_known_args(_plain_words(parser, [_with_home(word) for word in rest]))
    if unknown:
        raise _unknown(parser, unknown, getattr(module, "NOT_HERE", {}))
    if command != ("bench",):  # which times others' code too, as it runs by itself
        shorten_spinning()
    return int(module.run(args) or 0)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence of UserError, without the usage text before it."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError with argparse's message and where the options are listed."""
        given = re.fullmatch(r"argument (?:\S+/)?(\S+): invalid (\w+) value: '(.*)'", message)
        kinds = {"int": "a whole number", "float": "a number"}
        if given and given[2] in kinds:
            point = re.fullmatch(r"([+-]?\d*),(\d+(?:[eE][+-]?\d+)?)", given[3])
            hint = f"; with a decimal point it is {point[1] or '0'}.{point[2]}" if point else ""
            message = f"{given[1]} is {given[3]!r}; expected {kinds[given[2]]}{hint}"
        raise UserError(f"{self.prog}: {message}. '{self.prog} --help' lists the options")


def _unknown(parser: argparse.ArgumentParser, words: list[str], elsewhere: dict[str, str]) -> UserError:
    """The message about words that no option takes; `elsewhere` says what to do instead of some."""
    names = list(dict.fromkeys(word.partition("=")[0] for word in words if word.startswith("-")))
    if not names or not words[0].startswith("-"):
        return UserError(
            f"{parser.prog} does not know what to do with {words[0]!r}: no option before it takes (another) value. "
            f"'{parser.prog} --help' shows how many each takes"
        )
    known = {name.lstrip("-"): name for action in parser._actions for name in action.option_strings if "_" not in name}
    told = []
    for name in names:
        plain = name.lstrip("-").replace("_", "-")
        near = difflib.get_close_matches(plain, known, n=1, cutoff=0.7)
        hint = elsewhere.get(plain) or (f"did you mean {known[near[0]]!r}?" if near else "")
        told.append(f"{name!r}" + (f"; {hint}" if hint else ""))
    every = "--help-all" if "help-all" in known else "--help"
    if len(told) == 1:
        end = "" if told[0].endswith("?") else "."
        return UserError(f"{parser.prog} has no option {told[0]}{end} '{parser.prog} {every}' lists all")
    return UserError(
        "\n  ".join([f"{parser.prog} has none of these options:", *told]) + f"\n'{parser.prog} {every}' lists all"
    )


def _plain_words(parser: argparse.ArgumentParser, words: list[str]) -> list[str]:
    """The words as the parser wants them.

    `--image_size` is `--image-size`, and `--name true|false`, as main_dino.py writes switches, `--name` or `--no-name`.
    """
    known = {name: action for action in parser._actions for name in action.option_strings}
    plain: list[str] = []
    for word in words:
        name, equals, value = word.partition("=")
        hyphens = name.replace("_", "-")
        if name.startswith("--") and name not in known and hyphens in known:
            name, word = hyphens, hyphens + equals + value
        if equals and isinstance(known.get(name), argparse.BooleanOptionalAction):
            plain.append(name)
            word = value
        before = plain[-1] if plain else ""
        switch = isinstance(known.get(before), argparse.BooleanOptionalAction) and not before.startswith("--no-")
        if switch and word.lower() in ("false", "0"):
            plain[-1] = f"--no-{before[2:]}"
        elif not (switch and word.lower() in ("true", "1")):
            plain.append(word)
    return plain


def _with_home(word: str) -> str:
    """`--out=~/x`, in which shells leave the `~`, with the home folder."""
    option, equals, value = word.partition("=")
    return option + equals + os.path.expanduser(value) if option.startswith("--") and value.startswith("~") else word


def _command(words: list[str]) -> tuple[tuple[str, ...], list[str]]:
    """The command that the words begin with, and the words after it."""
    for length in (1, 2):
        if tuple(words[:length]) in COMMANDS:
            return tuple(words[:length]), words[length:]
    group = [command[1] for command in COMMANDS if len(command) == 2 and command[0] == words[0]]
    if group and len(words) > 1:
        raise UserError(
            f"dino-fast {words[0]} has no {words[1]!r}{nearest(words[1], group) or '.'} There is: {', '.join(group)}"
        )
    if group:
        raise UserError(
            f"dino-fast {words[0]} needs one of: {', '.join(group)} ('dino-fast {words[0]} --help' explains them)"
        )
    names = list(dict.fromkeys(command[0] for command in COMMANDS))
    raise UserError(
        f"there is no command {words[0]!r}{nearest(words[0], names) or '.'} Commands: {', '.join(names)} "
        "('dino-fast --help' explains them)"
    )


def _summaries(commands: Iterable[tuple[str, ...]]) -> list[str]:
    shown = {" ".join(command): COMMANDS[command][1] for command in commands}
    width = max(map(len, shown))
    return [f"  {name:<{width}}   {summary}" for name, summary in shown.items()]


def _overview() -> str:
    return "\n".join(
        [
            "usage: dino-fast COMMAND [options]",
            "",
            "Pretrain vision transformers by self-distillation (DINO), with fused kernels.",
            "",
            *_summaries(COMMANDS),
            "",
            "'dino-fast COMMAND --help' lists a command's options. To begin: dino-fast train",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
