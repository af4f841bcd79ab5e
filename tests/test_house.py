"""Imports run one way: train.py, sample.py, data → wings → run → method → model. No circle, no arrow back."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WINGS = ("judge", "evaluate", "attacks", "serve", "report", "bench")
ALIASES = ("backtrack.remote", "backtrack.collect")  # published names of files in the wings


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = [*ROOT.glob("*.py")]
for folder in ("model", "backtrack", "data"):
    FILES += (ROOT / folder).rglob("*.py")
MODULES = {module_of(file): file for file in FILES}


def imports_of(name: str) -> set[str]:
    """The modules of ours that a module imports, also within its functions."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & MODULES.keys() or {node.module}
    return found & MODULES.keys()


GRAPH = {name: imports_of(name) for name in MODULES}


def room(name: str) -> str:
    top, *rest = name.split(".")
    if top != "backtrack" or name in ALIASES:
        return top
    return rest[0] if rest and rest[0] in (*WINGS, "run") else "method"


def test_no_arrow_goes_the_wrong_way():
    for name, imported in GRAPH.items():
        for other in imported:
            arrow = f"{name} imports {other}"
            here, there = room(name), room(other)
            if here == "model":
                assert there == "model", arrow
            elif here == "method":
                assert there in ("method", "model") or other == "backtrack.run.say", arrow
            elif here == "run":
                assert there in ("run", "method", "model"), arrow
            elif here in WINGS and here != "bench":
                assert other not in ("train", "sample") and there != "bench", arrow
            elif name == "sample":
                assert there not in ("evaluate", "attacks", "report", "bench"), arrow


def test_there_is_no_circle():
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " → ".join([*path, name])
        if name not in done:
            for other in GRAPH[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in GRAPH:
        visit(name, ())
