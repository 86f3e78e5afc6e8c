"""The Dockerfiles as they are written; they are built and run where there is a builder."""

import json
import re
import shutil
import tomllib
from pathlib import Path

import pytest
from security_checks import failed_checks

ROOT = Path(__file__).parents[2]
FILES = {name: ROOT / f"Dockerfile.{name}" for name in ("operator", "router", "expert")}
MODULES = {
    "operator": "faasmoe_operator.kube",
    "router": "faasmoe_router",
    "expert": "faasmoe_expert",
}


@pytest.fixture(params=sorted(FILES))
def name(request: pytest.FixtureRequest) -> str:
    """Each image."""
    image: str = request.param
    return image


def instructions(name: str) -> list[tuple[str, str]]:
    """Return a Dockerfile's instructions in their order, each with its arguments."""
    text = re.sub(r"^#.*\n", "", FILES[name].read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [
        (word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines) if word
    ]


def last_stage(name: str) -> list[tuple[str, str]]:
    found = instructions(name)
    begin = max(index for index, (word, _) in enumerate(found) if word == "FROM")
    return found[begin:]


def test_has_two_stages_on_one_base_that_can_be_pinned(name: str) -> None:
    found = instructions(name)
    assert found[0] == ("ARG", "PYTHON_IMAGE=python:3.11-slim")
    bases = [rest for word, rest in found if word == "FROM"]
    assert bases == ["${PYTHON_IMAGE} AS build", "${PYTHON_IMAGE}"]


def test_what_runs_was_built_before_and_is_not_the_users(name: str) -> None:
    stage = last_stage(name)
    copied = [rest for word, rest in stage if word == "COPY"]
    assert copied == ["--from=build /opt/faasmoe /opt/faasmoe"]
    assert [rest for word, rest in stage if word == "USER"] == ["65532:65532"]
    assert [word for word, _ in stage][-2:] in (["USER", "ENTRYPOINT"], ["EXPOSE", "ENTRYPOINT"])


def test_starts_its_module_without_a_shell(name: str) -> None:
    (entry,) = (rest for word, rest in last_stage(name) if word == "ENTRYPOINT")
    assert json.loads(entry) == ["python", "-m", MODULES[name]]
    assert not [word for word, _ in instructions(name) if word in ("CMD", "SHELL", "HEALTHCHECK")]


def test_installs_the_extra_of_its_name(name: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert name in extras
    installs = [rest for word, rest in instructions(name) if word == "RUN" and "pip" in rest]
    assert installs[-1].endswith(f'".[{name}]"')


def test_only_the_data_plane_has_torch(name: str) -> None:
    text = FILES[name].read_text()
    assert ("TORCH_VERSION" in text) == (name != "operator")


def test_takes_the_torch_that_the_project_is_tested_with() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (version,) = re.findall(r"^TORCH\s*\?= torch==([0-9.]+)$", makefile, flags=re.MULTILINE)
    for name in ("router", "expert"):
        assert f"ARG TORCH_VERSION={version}\n" in FILES[name].read_text()


def test_names_no_host(name: str) -> None:
    assert "://" not in FILES[name].read_text()


def test_a_build_sees_only_what_it_needs() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*"
    taken = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert taken == {"pyproject.toml", "README.md", "LICENSE", "operator", "router", "expert_fn"}
    assert all((ROOT / path).exists() for path in taken)


def test_checkov_finds_no_fault_that_is_not_explained(tmp_path: Path) -> None:
    for file in FILES.values():
        shutil.copy(file, tmp_path)
    assert failed_checks(tmp_path, framework="dockerfile") == []
