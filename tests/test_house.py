"""The house has six rooms, one floor above the other, and none of them grows beyond its walls."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from lib.core.store import ROOT

# The rooms from the ground floor up, how many lines each may have, all of them together, the tests, and a line's width.
ROOMS = {"core": 2100, "data": 700, "evaluation": 900, "report": 800, "studies": 1300, "run": 350}
LIB, TESTS, WIDTH = 6000, 6000, 120
FILES = sorted((ROOT / "lib").rglob("*.py"))
CODE = [p for folder in ("lib", "tests", "benchmarks") for p in sorted((ROOT / folder).rglob("*.py"))]


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def imported(path: Path) -> set[str]:
    """The modules that a file imports, anywhere in it."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_from_no_room_above_it_and_keeps_to_its_size(room):
    above = [f"lib.{name}" for name in list(ROOMS)[list(ROOMS).index(room) + 1 :]]
    for path in (ROOT / "lib" / room).glob("*.py"):
        upwards = {name for name in imported(path) for other in above if name == other or name.startswith(f"{other}.")}
        assert not upwards, f"{path.relative_to(ROOT)} imports {upwards}"
    assert sum(len(lines(path)) for path in (ROOT / "lib" / room).glob("*.py")) <= ROOMS[room]


def test_files_and_lines_are_short():
    assert {p.parent.name for p in FILES} == {*ROOMS, "lib"}, "a file of lib lies in a room"
    long = {str(p.relative_to(ROOT)): len(lines(p)) for p in FILES if len(lines(p)) > 300}
    assert not long and sum(len(lines(p)) for p in FILES) <= LIB
    wide = {f"{p.relative_to(ROOT)}:{n}" for p in CODE for n, line in enumerate(lines(p), 1) if len(line) > WIDTH}
    assert not wide
    assert sum(len(lines(p)) for p in (ROOT / "tests").rglob("*.py")) <= TESTS


@pytest.mark.parametrize("module", ["lib", "lib.colab"])
def test_what_is_imported_in_an_instant_imports_no_library(module):
    program = f"import sys, {module}; print({{'torch', 'numpy', 'yaml', 'IPython'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
