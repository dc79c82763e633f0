"""The package's files import each other in one direction: no circle, and no layer imports one above it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "dino_fast"
# Areas above the operations, models and data, with those of them that each may import. Everything else may import none.
ABOVE = {
    "engine": {"engine"},
    "eval": {"engine", "eval"},
    "report": {"engine", "eval", "report", "cli"},
    "cli": {"engine", "eval", "report", "cli", "benchmarks"},
    "benchmarks": {"engine", "eval", "report", "cli", "benchmarks"},
}
# Files outside the top hand a call on to it: `dino_fast.train` and the like, and `python -m dino_fast`.
ENTRY = ("dino_fast", "dino_fast.__main__", "dino_fast.api")


def _modules() -> dict[str, Path]:
    """Every module of the package by its dotted name; the kernels are installed as dino_fast.kernels."""
    files = {path: path.relative_to(PACKAGE.parent) for path in PACKAGE.rglob("*.py")}
    named = {}
    for path, relative in files.items():
        if relative.parts[1] in ("kernels", "benchmarks"):  # links in a checkout, to folders with tests of their own
            continue
        parts = relative.with_suffix("").parts
        named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return named


def imported(name: str, path: Path, modules: dict[str, Path]) -> Iterator[str]:
    """Modules of the package that a file imports, at its top, in functions and for type checking."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            inside = [f"{base}.{alias.name}" for alias in node.names]
            # `from package import module` depends on the module; `from package import name` on the package.
            names = [x for x in inside if x not in modules and not x.endswith("._C")]  # _C is compiled, a leaf
            found = [x for x in inside if x in modules] + ([base] if names else [])
        else:
            continue
        yield from (x for x in found if x in modules and x != name)


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of more than one module (Tarjan 1972), sorted."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(edges.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1:
                found.append(sorted(component))

    for node in sorted(edges):
        if node not in index:
            visit(node)
    return sorted(found)


@pytest.fixture(scope="module")
def edges() -> dict[str, set[str]]:
    modules = _modules()
    assert len(modules) > 100
    return {name: set(imported(name, path, modules)) for name, path in modules.items()}


def test_no_two_files_import_each_other(edges: dict[str, set[str]]) -> None:
    found = circles(edges)
    assert not found, "\n".join(
        f"{' <-> '.join(circle)}: " + ", ".join(f"{a} -> {b}" for a in circle for b in sorted(edges[a] & set(circle)))
        for circle in found
    )


def wrong_layers(edges: dict[str, set[str]]) -> list[str]:
    """Imports that go up: from the engine to evaluation, report or commands, and from anything lower to the engine."""

    def area(name: str) -> str:
        return [*name.split("."), ""][1]

    return sorted(
        f"{name} -> {other}"
        for name, others in edges.items()
        for other in others
        if area(other) in ABOVE and area(other) not in ABOVE.get(area(name), ()) and name not in ENTRY
    )


def test_every_layer_imports_only_itself_and_lower_ones(edges: dict[str, set[str]]) -> None:
    assert not wrong_layers(edges)
    assert wrong_layers({"dino_fast.engine.x": {"dino_fast.eval.y"}, "dino_fast.eval.y": {"dino_fast.engine.x"}}) == [
        "dino_fast.engine.x -> dino_fast.eval.y"
    ]
    assert wrong_layers({"dino_fast.models.x": {"dino_fast.engine.y"}, "dino_fast.cli.x": {"dino_fast.report.y"}}) == [
        "dino_fast.models.x -> dino_fast.engine.y"
    ]


def test_the_walk_finds_circles_and_imports_in_functions(tmp_path: Path) -> None:
    for name, text in {
        "a": "def f():\n    from p import b\n",
        "b": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .c import x\n",
        "c": "import p.a\n",
        "d": "from p.a import y\n",
    }.items():
        (tmp_path / f"{name}.py").write_text(text)
    modules = {f"p.{name}": tmp_path / f"{name}.py" for name in "abcd"}
    edges = {name: set(imported(name, path, modules)) for name, path in modules.items()}
    assert edges == {"p.a": {"p.b"}, "p.b": {"p.c"}, "p.c": {"p.a"}, "p.d": {"p.a"}}
    assert circles(edges) == [["p.a", "p.b", "p.c"]]
