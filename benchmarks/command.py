"""`dino-fast bench [OP...]`: runs the benchmarks, prints tables, writes JSON and pictures."""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

from dino_fast.errors import UserError, make_folder, nearest


def operations() -> list[str]:
    """The names that `dino-fast bench` accepts: one for every bench_<name>.py of this package."""
    prefix = "bench_"
    names = (module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    return sorted(name.removeprefix(prefix) for name in names if name.startswith(prefix))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    known = ", ".join(operations())
    parser.add_argument("operations", nargs="*", metavar="OP", help=f"what to measure (default: all of {known})")
    parser.add_argument(
        "--quick", action="store_true", help="small shapes, 2 seconds each, for a first look, not kept as a result"
    )
    parser.add_argument(
        "--only",
        default="",
        metavar="ROW",
        help="of one operation, the comparisons whose name contains this; the others stay in today's result file",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the JSON files and pictures go")
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of tables")
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="with step: a run's config.yaml, of whose steps the parts are timed"
    )


def choose(names: list[str]) -> list[str]:
    """The operations to run; all of them where none is named. An unknown name is an error with the nearest one."""
    known = operations()
    names = [name.replace("-", "_") for name in names]
    for name in names:
        if name not in known:
            raise UserError(f"no benchmark is called '{name}'{nearest(name, known)} There are: {', '.join(known)}.")
    return names or known


def run(args: argparse.Namespace) -> int:
    """Runs what `args` (from `add_arguments`) asks for; returns the exit code, 1 if a result of ours was wrong."""
    names = choose(args.operations)
    if args.config is not None and names != ["step"]:
        raise UserError("--config is for one benchmark: dino-fast bench step --config FILE")
    if args.only and len(names) > 1:
        raise UserError("--only is for one benchmark: dino-fast bench dino_loss --only 'in place'")
    if args.out is not None:
        make_folder(args.out)  # before any time is spent
    if len(names) > 1:
        return _run_each(names, args)
    (name,) = names
    from . import report

    if not args.json:
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
    given = {"only": args.only} if args.config is None else {"config": args.config}
    rows = importlib.import_module(f".bench_{name}", __package__).run(quick=args.quick, **given)
    result = report.document(name, rows, quick=args.quick)
    # What is measured of somebody's run is no result of the benchmark.
    folder = args.out if args.config is not None else args.out or report.results_directory(quick=args.quick)
    paths = () if folder is None else report.write(result, folder, merge=bool(args.only))
    if args.json:
        print(json.dumps([result], indent=1))
    else:
        report.show(result)
        if paths:
            print(f"wrote {paths[0]} and {paths[1].name}", flush=True)
    if warning := report.loaded(result["rows"]):
        print(warning, file=sys.stderr)
    failed = [f"{name}: {row.contender}: {row.note}" for row in rows if row.note.startswith(("wrong", "failed"))]
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if any("dino-fast" in line for line in failed) else 0


def _run_each(names: list[str], args: argparse.Namespace) -> int:
    """Each operation in a process of its own: what one leaves in the allocator would slow the next one's contenders."""
    options = ["--quick"] * args.quick + ["--json"] * args.json + (["--out", str(args.out)] if args.out else [])
    results, code = [], 0
    for name in names:
        command = [sys.executable, "-m", f"{__package__}.command", name, *options]
        done = subprocess.run(command, stdout=subprocess.PIPE if args.json else None, text=True)
        code = max(code, abs(done.returncode))
        results += json.loads(done.stdout) if args.json and done.stdout else []
    if args.json:
        print(json.dumps(results, indent=1))
    return code


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.command", description=__doc__)
    add_arguments(parser)
    try:
        return run(parser.parse_args())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
