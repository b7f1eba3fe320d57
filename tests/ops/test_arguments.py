"""An op's arguments stand in two lists: the fields of its struct (csrc/*/op.h), and the call in megalm/ops.

The compiler takes the struct's; here the two are compared by name: an argument is called what its field is called.
"""

import ast
import keyword
import re
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import pytest
import torch

from megalm.ops import backend
from scripts.build_extension import ROOT, SOURCE

BUILTINS = ("format", "sum")  # as a keyword, they take an underscore


@dataclass(frozen=True)
class Field:
    name: str
    type: str
    elements: int = 1


@dataclass(frozen=True)
class Call:
    place: str
    arguments: tuple[ast.expr, ...]


def _fields(body: str) -> list[Field]:
    """Those of a struct's body."""
    found = []
    for declaration in re.sub(r"//[^\n]*", "", body).split(";"):
        parts = re.fullmatch(r"\s*(?:const )?(\w+)(.*)", declaration, re.DOTALL)
        if parts is None:
            continue
        for name in parts[2].split(","):
            words = re.fullmatch(r"\s*((?:\*|const|\s)*)(\w+)(?:\[(\d+)\])?\s*", name)
            assert words is not None, declaration
            kind = parts[1] if "*" not in words[1] else "address"
            found.append(Field(words[2], kind, int(words[3] or 1)))
    return found


def _read_structs() -> dict[str, list[Field]]:
    """The fields of each op that takes a device, by the name that Python calls."""
    headers = "\n".join(path.read_text() for path in sorted(SOURCE.glob("*/op.h")))
    structs = {name: _fields(body) for name, body in re.findall(r"\nstruct (\w+) \{\n(.*?)\n\};", headers, re.DOTALL)}
    of = dict(re.findall(r"^MEGALM_DECLARE_OP\((\w+), (\w+)\)", headers, re.MULTILINE))
    bound = re.findall(r'bind_op<(\w+)>\(m, "(\w+)"\)', (SOURCE / "bindings.cpp").read_text())
    return {name: structs[of[op]] for op, name in bound if op in of}


def _read_calls(names: set[str]) -> dict[str, list[Call]]:
    found: dict[str, list[Call]] = {name: [] for name in names}
    for path in sorted((ROOT / "megalm" / "ops").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in names):
                continue
            if node.args and ast.unparse(node.args[0]) in ("*where", *(f"*place({name})" for name in _words(node))):
                where = f"{Path(path).relative_to(ROOT)}:{node.lineno}"
                found[node.func.attr].append(Call(where, tuple(node.args[1:])))
    return found


def _words(expression: ast.AST) -> set[str]:
    nodes = list(ast.walk(expression))
    return {n.id for n in nodes if isinstance(n, ast.Name)} | {n.attr for n in nodes if isinstance(n, ast.Attribute)}


def misplaced(fields: list[Field], arguments: tuple[ast.expr, ...]) -> list[str]:
    """What stands where another field is expected. An array's elements come as one starred argument, others never."""
    if len(fields) != len(arguments):
        return [f"{len(arguments)} arguments for {len(fields)} fields"]
    found = []
    for field, argument in zip(fields, arguments, strict=True):
        name = f"{field.name}_" if keyword.iskeyword(field.name) or field.name in BUILTINS else field.name
        if isinstance(argument, ast.Starred) != (field.elements > 1) or name not in _words(argument):
            found.append(f"{ast.unparse(argument)} for {field.name}")
    return found


STRUCTS = _read_structs()
CALLS = _read_calls(set(STRUCTS))


@pytest.mark.parametrize("name", STRUCTS)
def test_each_argument_is_called_what_its_field_is_called(name):
    assert CALLS[name], f"megalm/ops does not call {name}"
    for call in CALLS[name]:
        assert not misplaced(STRUCTS[name], call.arguments), call.place


@pytest.mark.parametrize("name", STRUCTS)
def test_any_two_arguments_of_a_type_that_change_places_are_told(name):
    fields = STRUCTS[name]
    for call in CALLS[name]:
        for first, second in combinations(range(len(fields)), 2):
            if (fields[first].type, fields[first].elements) == (fields[second].type, fields[second].elements):
                arguments = list(call.arguments)
                arguments[first], arguments[second] = arguments[second], arguments[first]
                assert misplaced(fields, tuple(arguments)), (call.place, fields[first], fields[second])


needs_extension = pytest.mark.skipif(backend.find_library() is None, reason="megalm._C is not built")


@needs_extension
@pytest.mark.parametrize("name", STRUCTS)
def test_a_wrong_number_of_arguments_is_refused_with_both_numbers(name):
    taken = 2 + sum(field.elements for field in STRUCTS[name])
    for given in (0, taken - 1, taken + 1):
        with pytest.raises(TypeError, match=rf"^{name} takes {taken} arguments, not {given}: .*device's index"):
            getattr(backend.get_library(), name)(*[0] * given)


@needs_extension
def test_a_value_that_its_field_does_not_hold_is_refused_with_its_place():
    library = backend.get_library()
    good = {"index": -1, "stream": 0, "type": 0, "interleaved": False, "inverse": False}
    for change, message in (
        ({"index": 1 << 31}, "argument 1 of 22 is 2147483648; it takes an integer of its size"),
        ({"stream": -1}, "argument 2 of 22 is -1; it takes an address"),
        ({"type": 0.0}, "argument 3 of 22 is 0.0; it takes the number of a choice"),
        ({"type": True}, "argument 3 of 22 is True; it takes the number of a choice"),
        ({"interleaved": 1}, "argument 4 of 22 is 1; it takes True or False"),
        ({"inverse": None}, "argument 5 of 22 is None; it takes True or False"),
    ):
        with pytest.raises(TypeError, match=f"^rotary: {message}$"):
            library.rotary(*{**good, **change}.values(), *[0] * 17)
    with pytest.raises(TypeError, match=r"^fill: argument 1 of 7 is -1; it takes an unsigned integer of its size$"):
        library.fill(-1, 0, 0, 0, 0, 1.0, 0)
    with pytest.raises(TypeError, match=r"^fill: argument 6 of 7 is '1'; it takes a number$"):
        library.fill(0, 0, 0, 0, 0, "1", 0)
    with pytest.raises(
        TypeError, match=r"^json_lines takes 8 arguments, not 9: its struct in csrc/\*/op.h lists them$"
    ):
        library.json_lines(*[0] * 9)
    with pytest.raises(ValueError, match=r"^copy_digest: bytes must be more than 240$"):
        library.copy_digest(0, 0, 240)


@needs_extension
def test_arguments_reach_their_fields():
    """An array in a struct takes an argument for each element; whole numbers and numpy's serve where they are exact."""
    out = torch.zeros(2, 3, dtype=torch.int64)
    x = torch.arange(6).reshape(3, 2)
    backend.get_library().sequence_move(
        -1, 0, 1, out.shape[0], torch.tensor(3).numpy()[()], 0, 8, 16, 0, 24, 8, 8, x.data_ptr(), out.data_ptr()
    )
    assert out.equal(x.T)
