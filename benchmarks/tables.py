"""`python -m benchmarks.tables`: writes the tables of the documents from the result files, and no figure otherwise.

A document holds blocks between `<!-- table: OPERATION [SHAPE] -->` and `<!-- end -->`; what stands between is replaced
by the newest results of that operation that are not quick ones, a machine after the other (of all its shapes, or of the
one named), `<!-- table: summary -->` by a line for each shape of every operation but the evaluations and a column for
each machine, and `<!-- table: headlines -->` by the lines of HEADLINES alone. A block without a result stays empty.
`--check` changes nothing and exits 1 where a block is not what the files say.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from .report import HEADINGS, backend_of, cells, groups, human_bytes

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "docs/benchmarks.md", "docs/augmentation.md", "docs/evaluation.md")
NO_OPERATIONS = ("evaluation",)  # left out of the summary
HEADLINES = {  # of the README: (operation, beginning of the shape) and what it is called there
    ("dino_loss", "B16 V10 K65536, in place"): "`dino_loss`, 16 images, 65,536 prototypes",
    ("linear_dino_loss", "B64 V10 K65536"): "`linear_dino_loss`: last layer and loss, 64 images",
    ("multi_tensor step", "157 tensors"): "`AdamWEMA`: clipping, AdamW and teacher of a ViT-S",
    ("multi_crop", "16 JPEG"): "`MultiCrop`: JPEG to 2 + 8 crops, a thread",
    ("step", "B16 V10 K65536"): "a training step, small ViT, 16 images",
    ("engine", "B64 V10 K65536"): "`dino-fast train` beside the published script",
}
Results = dict[str, dict[str, dict[str, Any]]]  # operation -> machine -> result
BLOCK = re.compile(r"(<!-- table: (\w+)(?: ([^>]+?))? -->\n).*?(<!-- end -->)", re.DOTALL)


def newest(directory: Path) -> Results:
    """The latest full result of each operation on each machine."""
    results = [json.loads(path.read_text()) for path in directory.glob("*.json")]
    results = [r for r in results if isinstance(r, dict) and "operation" in r and not r.get("quick")]
    found: Results = {}
    for result in sorted(results, key=lambda result: result["date"]):
        found.setdefault(result["operation"], {})[machine(result)] = result
    return found


def machine(result: dict[str, Any]) -> str:
    """The processor in short: its name, and AMX where products ran on it."""
    name = re.sub(r"\((R|TM)\)|\bProcessor\b", "", result["device"])
    amx = result.get("amx", "Xeon" in name)  # files of before do not say it; all were made on one Xeon, which has it
    return " ".join(name.split()) + (" (AMX)" if amx else "")


def table(result: dict[str, Any], shape: str | None = None) -> str:
    """Markdown: one table a shape, under a line that says where it was measured."""
    where = f"{result['device']}, {result['threads']} threads, torch {result['torch']}, {result['date'][:10]}"
    lines = []
    for (operation, name, dtype), rows in groups(result["rows"]):
        if shape and shape != name:
            continue
        allocators = " / ".join(sorted({row["allocator"] for row in rows if row["allocator"]}))
        lines += [f"{operation}, {name}, {dtype} ({where}; allocator: {allocators})", ""]
        lines += ["| " + " | ".join(HEADINGS) + " |", "|---|" + "---:|" * (len(HEADINGS) - 2) + "---|"]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells(row)) + " |" for row in rows]
        lines.append("")
    if not lines:
        raise SystemExit(f"the newest result of {result['operation']} has no shape '{shape}'")
    return "\n".join(lines)


def machines(results: Results) -> list[str]:
    """All machines, in one order for every table."""
    return sorted({name for by_machine in results.values() for name in by_machine}, reverse=True)


def summary(results: Results) -> str:
    """Markdown: a line for each shape, a column for each machine."""
    columns = machines(results)
    lines = ["| operation | shape | " + " | ".join(columns) + " |", "|---|---|" + "---|" * len(columns)]
    for measured, by_machine in sorted(results.items()):
        if measured in NO_OPERATIONS:
            continue
        keys = dict.fromkeys(key for result in by_machine.values() for key, _ in groups(result["rows"]))
        for key in keys:
            told = [told_of(by_machine.get(name), key) for name in columns]
            if any(told):
                lines.append(f"| {key[0]} | {key[1]}, {key[2]} | " + " | ".join(told) + " |")
    return "\n".join([*lines, "", LEGEND + where(results, columns), ""])


def headlines(results: Results) -> str:
    """Markdown: the lines of HEADLINES, a column for each machine."""
    columns = machines(results)
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for (operation, begin), name in HEADLINES.items():
        by_machine = results.get(operation.split()[0], {})
        told = []
        for column in columns:
            rows = by_machine.get(column, {"rows": []})["rows"]
            keys = [k for k, _ in groups(rows) if k[0] == operation and k[1].startswith(begin) and k[2] == "float32"]
            told.append(told_of(by_machine[column], keys[0], short=True) if keys else "")
        if any(told):
            lines.append(f"| {name} | " + " | ".join(told) + " |")
    return "\n".join([*lines, "", where(results, columns), ""])


LEGEND = (
    "Milliseconds of ours; how many times as long the baseline and the best of the others take, in the same rounds; "
    "ours beside the floor; extra memory, ours / baseline. "
)


def told_of(result: dict[str, Any] | None, key: tuple[str, str, str], *, short: bool = False) -> str:
    """What a machine's result says of one comparison; nothing where ours was not timed there."""
    rows = dict(groups(result["rows"])).get(key, []) if result else []
    ours = next((row for row in rows if row["role"] == "ours" and row["ms"]), None)
    if ours is None:
        return ""
    base = next((row for row in rows if row["role"] == "baseline" and row["ms"]), None)
    timed = [row for row in rows if not row["role"] and row["ms"] and "probe" not in row["contender"]]
    best = min(timed, key=lambda row: row["ms"], default=None)
    backend = backend_of(ours)
    parts = [f"{ours['ms']:.4g} ms" + (f" ({backend})" if backend and not short else "")]
    parts += [_speedup(row) for row in (base, best) if row]
    if short:
        parts[1:] = parts[1:][::-1] if base and best and best["ms"] > base["ms"] else parts[1:]
        return "; ".join(parts[:3])
    if ours["floor_share"] is not None:
        parts.append(f"{100 * ours['floor_share']:.0f} % of the floor")
    memory = [human_bytes(row["peak_bytes"]) for row in (ours, base) if row and row["peak_bytes"] is not None]
    return "; ".join([*parts, *([" / ".join(memory)] if memory else [])])


def _speedup(row: dict[str, Any]) -> str:
    return f"{'unsteady' if row['ratio'] is None else format(row['ratio'], '.2f') + 'x'} {row['contender']}"


def where(results: Results, columns: list[str]) -> str:
    """A sentence a machine: threads, versions of torch and days of its results."""
    sentences = []
    for column in columns:
        of = [by_machine[column] for by_machine in results.values() if column in by_machine]
        threads = " or ".join(sorted({str(result["threads"]) for result in of}))
        torch = ", ".join(sorted({result["torch"] for result in of}))
        days = sorted({result["date"][:10] for result in of})
        sentences.append(
            f"{column}: {threads} threads, torch {torch}, {' to '.join(dict.fromkeys((days[0], days[-1])))}."
        )
    return " ".join(sentences)


def fill(text: str, directory: Path) -> str:
    """`text` with every block made anew."""
    results = newest(directory)

    def block(match: re.Match[str]) -> str:
        name, shape = match[2], match[3]
        if name in ("summary", "headlines"):
            body = (summary if name == "summary" else headlines)(results) if results else ""
        else:
            found = results.get(name, {})
            body = "\n".join(table(found[column], shape) for column in machines(results) if column in found)
        return match[1] + (f"\n{body}\n" if body else "") + match[4]

    return BLOCK.sub(block, text)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where a document is out of date")
    args = parser.parse_args()
    stale = []
    for path in (ROOT / name for name in DOCUMENTS):
        before = path.read_text() if path.is_file() else ""
        after = fill(before, ROOT / "benchmarks" / "results")
        if after != before:
            stale.append(path.name)
            if not args.check:
                path.write_text(after)
    print(("out of date: " if args.check else "updated: ") + ", ".join(stale) if stale else "all up to date")
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
