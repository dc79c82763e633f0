"""`python -m benchmarks.tables`: writes the tables of the documents from the result files, and no figure otherwise.

A document holds blocks between `<!-- table: OPERATION [SHAPE] -->` and `<!-- end -->`; what stands between is replaced
by the newest result of that operation that is not a quick one (of all its shapes, or of the one named), and
`<!-- table: summary -->` by a line for each shape of every operation but the evaluations. A block without a result
stays empty.
`--check` changes nothing and exits 1 where a block is not what the files say.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from .report import HEADINGS, cells, groups, human_bytes

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "docs/benchmarks.md", "docs/augmentation.md", "docs/evaluation.md")
NO_OPERATIONS = ("evaluation",)  # left out of the summary
BLOCK = re.compile(r"(<!-- table: (\w+)(?: ([^>]+?))? -->\n).*?(<!-- end -->)", re.DOTALL)


def newest(directory: Path) -> dict[str, dict[str, Any]]:
    """The latest full result of each operation."""
    results = [json.loads(path.read_text()) for path in directory.glob("*.json")]
    results = [r for r in results if isinstance(r, dict) and "operation" in r and not r.get("quick")]
    return {result["operation"]: result for result in sorted(results, key=lambda result: result["date"])}


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


def summary(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: for each shape, ours beside the baseline and the best of the others."""
    lines = ["| operation | shape | ours | baseline | best other | of the floor | extra memory, ours / baseline |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|")
    for measured, result in sorted(results.items()):
        if measured in NO_OPERATIONS:
            continue
        for (name, shape, dtype), rows in groups(result["rows"]):
            timed = [row for row in rows if row["ratio"]]
            ours = next((row for row in timed if row["role"] == "ours"), None)
            if ours is None:
                continue
            base = next((row for row in timed if row["role"] == "baseline"), None)
            others = sorted((row for row in timed if not row["role"]), key=lambda row: row["ms"])
            memory = " / ".join(human_bytes(row["peak_bytes"]) for row in (ours, base) if row)
            floor = cells(ours)[3]
            line = [
                name,
                f"{shape}, {dtype}",
                f"{ours['ms']:.4g} ms",
                _speedup(base),
                _speedup(next(iter(others), None)),
            ]
            lines.append("| " + " | ".join([*line, floor, memory]) + " |")
    where = sorted({f"{r['device']}, {r['threads']} threads, torch {r['torch']}" for r in results.values()})
    return "\n".join([*lines, "", "Times are relative to ours in the same run. " + "; ".join(where) + ".", ""])


def _speedup(row: dict[str, Any] | None) -> str:
    return f"{row['ratio']:.2f}x ({row['contender']})" if row else ""


def fill(text: str, directory: Path) -> str:
    """`text` with every block made anew."""
    results = newest(directory)

    def block(match: re.Match[str]) -> str:
        name, shape = match[2], match[3]
        if name == "summary":
            body = summary(results) if results else ""
        else:
            body = table(results[name], shape) if name in results else ""
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
