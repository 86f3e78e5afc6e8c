"""Modules, classes and programs that the documentation names exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE_FOLDERS = (
    *("operator", "router", "expert_fn", "gateway"),
    *("benchmarks", "tests", "examples", "kernels"),
)
SOURCES = [
    path for folder in SOURCE_FOLDERS for path in (ROOT / folder).rglob("*.py") if path.is_file()
]
SOURCE_PATHS = {f"/{path.relative_to(ROOT)}" for path in SOURCES}
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "README.md"]
FOREIGN_CLASSES = {"ConfigMap", "ConfigMaps", "LeaseLock", "ReadWriteOnce"}


def code_spans(page: Path) -> list[str]:
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    return re.findall(r"`([^`\n]+)`", prose)


def class_names() -> set[str]:
    return {
        node.name
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    }


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_named_source_files_exist(page: Path) -> None:
    paths = [span for span in code_spans(page) if re.fullmatch(r"[\w/]+\.py", span)]
    assert [p for p in paths if not any(s.endswith(f"/{p}") for s in SOURCE_PATHS)] == []


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_named_modules_exist(page: Path) -> None:
    text = page.read_text()
    modules = set(re.findall(r"\b(?:faasmoe_[a-z]+|benchmarks)(?:\.[a-z_0-9]+)+(?![\w/*(])", text))
    suffixes = {m: m.replace(".", "/") for m in modules if not m.endswith((".py", ".md"))}
    missing = [
        module
        for module, path in suffixes.items()
        if not any(
            s.endswith((f"/{path}.py", f"/{path}/__init__.py", f"/{path}/__main__.py"))
            for s in SOURCE_PATHS
        )
    ]
    assert missing == []


def test_classes_named_in_design_notes_exist() -> None:
    text = (ROOT / "docs" / "design.md").read_text()
    named = set(re.findall(r"\b(?:[A-Z][a-z]+){2,}\b", text))
    assert named - class_names() - FOREIGN_CLASSES == set()
    assert {"DeferredTensor", "LogitsState"} <= named
