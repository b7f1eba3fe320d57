"""The house's arrows: who may import whom."""

import ast
from pathlib import Path

import pytest

import megalm

ROOT = Path(megalm.__file__).parent

LAYERS = ["ops", "parallel", "model", "pipeline", "build", "trainer", "worker", "launch"]
"""Each may import those before it, never one after it."""

ALLOWED = {
    "config": set(),
    "plan": {"config", "pipeline", "page"},
    "page": set(),
    "data": {"config", "_C"},
    "hooks": set(),
}
"""Parts that may import only these (and themselves)."""

ATTACHED = ["guard", "checkpoint", "observe", "resilience", "evaluate"]
"""Hooks: never import the launcher."""


def part_of(module: str) -> str | None:
    names = module.split(".")
    return names[1] if names[0] == "megalm" and len(names) > 1 else None


def imports(file: Path, *, at_run_time_only: bool = True) -> set[str]:
    """Parts of megalm that a file imports, not counting what only a type checker sees."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(part for alias in node.names if (part := part_of(alias.name)))
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "megalm":
                found.update(alias.name for alias in node.names)
            elif part := part_of(node.module):
                found.add(part)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(file.read_text()))
    return found


def files_of(part: str) -> list[Path]:
    single = ROOT / f"{part}.py"
    return [single] if single.exists() else sorted((ROOT / part).rglob("*.py"))


@pytest.mark.parametrize("part", LAYERS)
def test_layers_point_one_way(part):
    later = set(LAYERS[LAYERS.index(part) + 1 :])
    for file in files_of(part):
        assert not imports(file) & later, f"{file.relative_to(ROOT)} imports {imports(file) & later}"


@pytest.mark.parametrize("part", ALLOWED)
def test_leaves_import_only_what_they_may(part):
    for file in files_of(part):
        extra = imports(file) - ALLOWED[part] - {part}
        if part == "config" and file.name == "resolve.py":
            extra -= {"parallel", "plan"}  # asked for the layout and the number of parameters, when they are needed
        assert not extra, f"{file.relative_to(ROOT)} imports {extra}"


@pytest.mark.parametrize("part", ATTACHED)
def test_hooks_do_not_know_the_launcher(part):
    for file in files_of(part):
        known = imports(file) & {"launch", "trainer"}
        assert not known, f"{file.relative_to(ROOT)} imports {known}"


@pytest.mark.parametrize("part", ["config", "plan"])
def test_torch_is_not_imported_before_it_is_needed(part):
    for file in files_of(part):
        top = [n for n in ast.parse(file.read_text()).body if isinstance(n, (ast.Import, ast.ImportFrom))]
        names = {alias.name for n in top if isinstance(n, ast.Import) for alias in n.names}
        names |= {n.module for n in top if isinstance(n, ast.ImportFrom) and n.module}
        assert not any(name == "torch" or name.startswith("torch.") for name in names), file.relative_to(ROOT)
