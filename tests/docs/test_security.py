"""docs/security.md names, for each attack that is defended, tests and figures that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TEXT.splitlines()
    if line.startswith("|") and line.count("|") == 4
]
NOT_DEFENDED = {"a sandbox that answers wrongly"}


def attack_figures() -> set[str]:
    """Return the figures of `make attack` that have a bound."""
    module = ast.parse((ROOT / "tests" / "attack" / "run.py").read_text(encoding="utf-8"))
    for node in module.body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "BOUNDS":
            assert isinstance(node.value, ast.Dict)
            return {ast.literal_eval(key) for key in node.value.keys if key is not None}
    raise AssertionError("tests/attack/run.py has no BOUNDS")


def named_tests(cell: str) -> list[str]:
    return [name for name in re.findall(r"`([^`]+)`", cell) if name.startswith(("tests/", "test_"))]


def defence_rows() -> list[list[str]]:
    start = next(i for i, row in enumerate(ROWS) if row[0] == "attack")
    return [row for row in ROWS[start:] if row[0] not in ("attack", "---")]


@pytest.mark.parametrize("row", defence_rows(), ids=lambda row: row[0])
def test_defence_names_tests_that_exist(row: list[str]) -> None:
    attack, _, cell = row
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py")}
    named = named_tests(cell)
    missing = [
        name
        for name in named
        if not (ROOT / name).is_dir() and not any(f"/{f}".endswith(f"/{name}") for f in files)
    ]
    assert missing == []
    assert named or "make " in cell or attack in NOT_DEFENDED


def test_named_figures_of_the_attack_have_bounds() -> None:
    cells = [row[2] for row in defence_rows() if "`make attack`" in row[2]]
    named = {
        name
        for cell in cells
        for name in re.findall(r"`([a-z_]+)`", cell.partition("`make attack`")[2])
    }
    assert len(named) >= 4
    assert named - attack_figures() == set()


def test_undefended_rows_are_still_there() -> None:
    assert {row[0] for row in defence_rows()} >= NOT_DEFENDED
