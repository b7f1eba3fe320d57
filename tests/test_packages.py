"""constraints.txt pins what every test environment installs; a line that pip cannot follow stops the install of everybody."""

import re
from importlib import metadata
from pathlib import Path

import pytest

LINES = (Path(__file__).parent.parent / "constraints.txt").read_text().splitlines()
PINS = [re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.+!]+)(?: # .+)?", line) for line in LINES]


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_line_pins_one_package_once_in_alphabetical_order():
    assert [line for line, pin in zip(LINES, PINS, strict=True) if pin is None] == []
    names = [_normalized(pin[1]) for pin in PINS if pin]
    assert names == sorted(set(names))


@pytest.mark.parametrize("pin", [pin for pin in PINS if pin], ids=lambda pin: pin[1])
def test_what_is_installed_is_what_is_pinned(pin):
    try:
        installed = metadata.version(pin[1])
    except metadata.PackageNotFoundError:
        pytest.skip(f"{pin[1]} is not installed here")
    assert installed.split("+")[0] == pin[2]
