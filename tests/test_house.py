"""The floors of the house: a file imports only from floors below its own, and only mcore/ imports Megatron."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "linear_moe"
FLOORS = {"ops": 1, "ssm": 2, "mom": 2, "parallel": 3, "convert": 3, "data": 3, "mcore": 4, "inference": 5}
FLOORS |= {"evaluation": 5, "measure": 6, "commands": 7}
ENGINE = {"megatron", "transformer_engine", "apex"}
FILES = sorted(ROOT.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, wherever in the file."""
    package = ("linear_moe", *path.relative_to(ROOT).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) + "." if node.level else ""
            module = base + (node.module or "")
            found |= {module} if node.module else {module + name.name for name in node.names}
    return found


def folder(path: Path) -> str | None:
    parts = path.relative_to(ROOT).parts
    return parts[0] if len(parts) > 1 else None


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
    own = folder(path)
    for name in imports(path):
        top, *rest = name.split(".")
        if top in ENGINE:
            assert own == "mcore", f"{path} imports {name}: only mcore/ may"
        if top == "linear_moe" and rest and own is not None:
            assert rest[0] == own or FLOORS[rest[0]] < FLOORS[own], f"{path} (floor {FLOORS[own]}) imports {name}"


def test_every_folder_has_a_floor():
    assert {folder(path) for path in FILES} - {None} <= FLOORS.keys()


@pytest.mark.parametrize("name", sorted({folder(path) for path in FILES} - {None}))
def test_no_circle_inside_a_folder(name):
    graph = {}
    for path in ROOT.joinpath(name).rglob("*.py"):
        module = ".".join(("linear_moe", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
        graph[module] = imports(path)
    modules = set(graph)
    while modules:
        free = {m for m in modules if not any(m != n and n in graph[m] for n in modules)}
        assert free, f"{sorted(modules)} import each other in a circle"
        modules -= free


def test_the_package_imports_without_megatron():
    assert not any(name.split(".")[0] in ENGINE for name in imports(ROOT / "__init__.py"))
