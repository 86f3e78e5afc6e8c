"""The table of private names resolves, and a name that is missing is reported at start-up."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from transformers.generation.continuous_batching.requests import RequestState

import faasmoe_expert.__main__ as sandbox
import faasmoe_router.__main__ as router
import faasmoe_transformers
from faasmoe_router.checkpoint.__main__ import DTYPE_NAMES
from faasmoe_router.checkpoint.__main__ import main as run_checkpoint
from faasmoe_transformers import version_check
from faasmoe_transformers.errors import UnsupportedVersions
from faasmoe_transformers.model_skeleton import DTYPES
from faasmoe_transformers.private_names import PRIVATE_NAMES, PrivateName
from faasmoe_transformers.version_check import (
    CHECKPOINT_MODULES,
    ROUTER_MODULES,
    SANDBOX_MODULES,
    SUPPORTED_VERSIONS,
    VLLM_MODULES,
    check_private_names,
    find_missing,
)

PACKAGE = Path(faasmoe_transformers.__file__).parent
PROJECT = Path(__file__).parents[2] / "pyproject.toml"
FAKE_MODULE = "faasmoe_fake_library"


def test_every_name_resolves_against_the_installed_versions() -> None:
    assert find_missing(PRIVATE_NAMES) == []
    check_private_names()


@pytest.mark.parametrize("name", PRIVATE_NAMES, ids=lambda name: f"{name.used_by}-{name.location}")
def test_every_name_occurs_in_the_module_that_uses_it(name: PrivateName) -> None:
    source = (PACKAGE / f"{name.used_by}.py").read_text()
    key = name.location.partition("[")[2].removesuffix("]")
    assert (key or name.attribute or name.location) in source
    assert name.reason


def test_no_name_is_listed_twice_for_a_module() -> None:
    keys = [(name.location, name.used_by) for name in PRIVATE_NAMES]
    assert len(keys) == len(set(keys))


def test_every_module_that_uses_names_is_checked_by_a_process() -> None:
    checked = {*ROUTER_MODULES, *CHECKPOINT_MODULES, *SANDBOX_MODULES, *VLLM_MODULES}
    assert checked == {name.used_by for name in PRIVATE_NAMES}


def test_a_missing_name_is_reported_with_its_use_and_the_supported_versions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(RequestState, "create_equivalent_initial_request")
    with pytest.raises(UnsupportedVersions) as caught:
        check_private_names(ROUTER_MODULES)
    message = str(caught.value)
    assert "RequestState.create_equivalent_initial_request (scheduler: turns a running" in message
    assert message.count("; ") == 0  # nothing else is missing
    assert f"transformers{SUPPORTED_VERSIONS['transformers']}" in message
    assert f"torch{SUPPORTED_VERSIONS['torch']}" in message
    assert "got torch 2." in message


def test_names_of_other_modules_and_libraries_are_not_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(RequestState, "create_equivalent_initial_request")
    check_private_names(CHECKPOINT_MODULES)
    check_private_names(libraries=("torch",))


@pytest.fixture
def fake_library(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType(FAKE_MODULE)
    exec(
        "class Base:\n"
        "    annotated: int\n"
        "    def __init__(self):\n"
        "        self.stored = 1\n"
        "class Derived(Base):\n"
        "    def method(self, named, **options):\n"
        "        print(self.loaded)\n"
        "        return options.pop('popped')\n"
        "def decorate(cls):\n"
        "    def init(self):\n"
        "        self.decorated = True\n"
        "    cls.__init__ = init\n"
        "REGISTRY = {'paged|eager': 1}\n",
        module.__dict__,
    )
    monkeypatch.setitem(sys.modules, FAKE_MODULE, module)


@pytest.mark.usefixtures("fake_library")
@pytest.mark.parametrize(
    ("path", "is_present"),
    [
        ("Derived", True),
        ("Derived.method", True),
        ("Derived.annotated", True),
        ("Derived.stored", True),
        ("Derived.loaded", False),
        ("Derived.gone", False),
        ("Gone.method", False),
        ("decorate.decorated", True),
        ("decorate.gone", False),
        ("Derived.method(named)", True),
        ("Derived.method(popped)", True),
        ("Derived.method(gone)", False),
        ("Derived.gone(named)", False),
        ("REGISTRY[paged|eager]", True),
        ("REGISTRY[gone]", False),
    ],
)
def test_locations_of_every_form_resolve_only_if_they_are_there(
    path: str, is_present: bool
) -> None:
    name = PrivateName(f"{FAKE_MODULE}:{path}", "scheduler", "a test")
    assert find_missing([name]) == ([] if is_present else [name])


@pytest.mark.parametrize("location", ["torch._gone", "torch._gone:name", "transformers.gone:name"])
def test_a_missing_module_is_reported(location: str) -> None:
    name = PrivateName(location, "scheduler", "a test")
    assert find_missing([name]) == [name]


def test_a_sandbox_checks_without_transformers_and_without_loading_what_is_deferred() -> None:
    script = """
import sys
from faasmoe_transformers.lazy_import import META_REGISTRATIONS, defer_import
from faasmoe_transformers.version_check import SANDBOX_MODULES, check_private_names
assert "torch" not in sys.modules
defer_import(META_REGISTRATIONS)
import torch
check_private_names(SANDBOX_MODULES, libraries=("torch",))
assert "transformers" not in sys.modules
assert "torch._decomp.decompositions" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.fixture
def missing_name(monkeypatch: pytest.MonkeyPatch) -> str:
    """Makes a name of every process be missing; returns its location."""
    location = "torch:Tensor._gone"
    users = (ROUTER_MODULES[0], CHECKPOINT_MODULES[0], SANDBOX_MODULES[0])
    names = tuple(PrivateName(location, module, "a test") for module in users)
    monkeypatch.setattr(version_check, "PRIVATE_NAMES", names)
    return location


def test_the_router_does_not_start_with_a_missing_name(
    missing_name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FAASMOE_STORE", str(tmp_path))
    monkeypatch.setenv("FAASMOE_TABLE", str(tmp_path / "table.json"))
    assert router.main() == router.EXIT_BAD_CONFIG
    assert missing_name in capsys.readouterr().err


def test_a_sandbox_does_not_start_with_a_missing_name(
    missing_name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAASMOE_PORT", "0")
    assert sandbox.main() == 2
    assert missing_name in capsys.readouterr().err


def test_a_preparation_does_not_start_with_a_missing_name(
    missing_name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log"
    command = ["prepare", str(tmp_path), str(tmp_path / "store"), "--termination-log", str(log)]
    assert run_checkpoint(command) == 1
    assert missing_name in capsys.readouterr().err
    assert missing_name in log.read_text()


def test_the_supported_versions_are_those_of_pyproject() -> None:
    extras = tomllib.loads(PROJECT.read_text())["project"]["optional-dependencies"]["expert"]
    assert {f"{name}{allowed}" for name, allowed in SUPPORTED_VERSIONS.items()} <= set(extras)


def test_the_command_line_offers_the_dtypes_that_are_served() -> None:
    assert sorted(DTYPE_NAMES) == sorted(DTYPES)
