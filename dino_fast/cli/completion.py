"""`dino-fast completion SHELL`: the script with which a shell completes commands, options and their choices."""

from __future__ import annotations

import argparse
import importlib

from dino_fast.errors import UserError

SHELLS = ("bash", "zsh", "tcsh")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to its parser."""
    parser.add_argument("shell", choices=SHELLS, help="the shell that reads the script")
    parser.epilog = (
        'bash: eval "$(dino-fast completion bash)" in ~/.bashrc; '
        "zsh: dino-fast completion zsh > a file named _dino-fast in a folder of $fpath"
    )


def run(args: argparse.Namespace) -> int:
    """Prints the script and returns its exit status."""
    try:
        import shtab
    except ImportError:
        raise UserError("completion needs the package shtab: pip install shtab") from None
    print(shtab.complete(whole_parser(), shell=args.shell))
    return 0


def whole_parser() -> argparse.ArgumentParser:
    """One parser of all commands, which `main` reads one at a time."""
    from dino_fast.cli.main import COMMANDS

    parser = argparse.ArgumentParser(prog="dino-fast")
    commands = parser.add_subparsers()
    groups = {}
    for words, (module, summary) in COMMANDS.items():
        parent = commands
        if len(words) == 2:
            if words[0] not in groups:
                groups[words[0]] = commands.add_parser(words[0], help=f"{words[0]} commands").add_subparsers()
            parent = groups[words[0]]
        one = parent.add_parser(words[-1], help=summary)
        importlib.import_module(module).add_arguments(one)
        for action in one._actions:
            _describe(action)
    return parser


def _describe(action: argparse.Action) -> None:
    """Shows what only `--help-all` does, names' choices, and where a path belongs."""
    action.help = getattr(action, "full_help", action.help)
    if isinstance(action.metavar, str) and "|" in action.metavar:
        action.choices = action.metavar.split("|")
    elif action.dest in ("data", "out", "run", "checkpoint") or action.metavar in ("FILE", "DIR", "PATH"):
        action.complete = _path()  # type: ignore[attr-defined]


def _path() -> dict[str, str]:
    """What shtab takes for an argument that is a path."""
    import shtab

    return shtab.FILE
