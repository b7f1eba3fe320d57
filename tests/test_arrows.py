"""The house's arrows: who may import whom. Rooms are listed from the ground up; what one imports lies below it."""

import ast
from pathlib import Path

import pytest

import megalm

ROOT = Path(megalm.__file__).parent

ROOMS = [
    "config", "serving", "journal", "page", "architecture", "ops", "precision", "tokenizer", "data", "corpus", "parallel",
    "model", "objectives", "optim", "pipeline", "plan", "checkpoint", "convert",
    "generate", "train", "guard", "evaluate", "posttrain", "observe", "resilience", "launch", "library", "plugins",
]  # fmt: skip

NOTHING_BUT = {
    "config": set(),
    "serving": {"config"},
    "journal": set(),
    "page": set(),
    "architecture": {"config"},
    "tokenizer": {"config"},
    "data": {"config", "tokenizer"},
    "corpus": {"config", "serving", "tokenizer", "data"},
    "plan": {"config", "journal", "architecture", "pipeline", "page"},
}
"""Rooms that may not use all that lies below them."""

WITHOUT_TORCH = ["config", "serving", "journal", "page", "architecture", "plan"]


def imports(file: Path, package: str = "megalm") -> set[str]:
    """Modules of a package that a file imports, not counting what only a type checker sees."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(file.read_text()))
    return {name for name in found if name.split(".")[0] == package}


def files_of(room: str) -> list[Path]:
    single = ROOT / f"{room}.py"
    return [single] if single.exists() else sorted((ROOT / room).rglob("*.py"))


def rooms_of(file: Path, room: str) -> set[str]:
    """Other rooms that a file imports. `megalm._C` and `megalm.__version__` are no rooms."""
    names = {name.split(".")[1] for name in imports(file) if "." in name}
    return {name for name in names if not name.startswith("_")} - {room}


def module_of(name: str) -> str | None:
    """The file's module that an imported name lies in; None for what is no module of megalm."""
    parts = name.split(".")
    while parts:
        path = ROOT.parent.joinpath(*parts)
        if path.with_suffix(".py").exists():
            return ".".join(parts)
        if (path / "__init__.py").exists():
            return ".".join([*parts, "__init__"])
        parts.pop()
    return None


def test_every_room_has_its_place():
    there = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert {name for name in there if not name.startswith("_")} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_arrows_point_down(room):
    below = set(ROOMS[: ROOMS.index(room)])
    for file in files_of(room):
        extra = rooms_of(file, room) - NOTHING_BUT.get(room, below)
        assert not extra, f"{file.relative_to(ROOT)} imports {extra}"


def test_no_circle_of_modules():
    graph: dict[str, set[str]] = {}
    for file in sorted(ROOT.rglob("*.py")):
        name = ".".join(file.relative_to(ROOT.parent).with_suffix("").parts)
        graph[name] = {module for found in imports(file) if (module := module_of(found))} - {name}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in sorted(graph.get(name, ())):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("folder", ["megalm", "tools", "scripts"])
def test_nothing_that_is_shipped_knows_the_tests(folder):
    for file in sorted((ROOT.parent / folder).rglob("*.py")):
        assert not imports(file, "tests"), file.relative_to(ROOT.parent)


def test_the_engine_does_not_know_its_tools():
    for file in sorted(ROOT.rglob("*.py")):
        assert not imports(file, "tools"), file.relative_to(ROOT.parent)


def test_tools_import_one_another_relatively():
    """The same files are `tools` in a checkout and `megalm.tools` where they are installed."""
    for file in sorted((ROOT.parent / "tools").rglob("*.py")):
        assert not imports(file, "tools"), f"{file.relative_to(ROOT.parent)}: write `from ..subcommands import ...`"


@pytest.mark.parametrize("room", WITHOUT_TORCH)
def test_torch_is_not_imported_before_it_is_needed(room):
    for file in files_of(room):
        top = [n for n in ast.parse(file.read_text()).body if isinstance(n, (ast.Import, ast.ImportFrom))]
        names = {alias.name for n in top if isinstance(n, ast.Import) for alias in n.names}
        names |= {n.module for n in top if isinstance(n, ast.ImportFrom) and n.module}
        assert not any(name == "torch" or name.startswith("torch.") for name in names), file.relative_to(ROOT)
