"""Static checks of the Dockerfiles; building and running them needs a builder."""

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
    """Name of each image in turn."""
    image: str = request.param
    return image


def instructions(name: str) -> list[tuple[str, str]]:
    """Return the instructions of a Dockerfile in order, with their arguments."""
    text = re.sub(r"^#.*\n", "", FILES[name].read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [
        (word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines) if word
    ]


def last_stage(name: str) -> list[tuple[str, str]]:
    stages = instructions(name)
    start = max(index for index, (word, _) in enumerate(stages) if word == "FROM")
    return stages[start:]


def test_has_two_stages_on_a_configurable_base(name: str) -> None:
    lines = instructions(name)
    assert lines[0] == ("ARG", "PYTHON_IMAGE=python:3.11-slim")
    bases = [rest for word, rest in lines if word == "FROM"]
    assert bases == ["${PYTHON_IMAGE} AS build", "${PYTHON_IMAGE}"]


def test_last_stage_copies_build_and_runs_as_non_root(name: str) -> None:
    stage = last_stage(name)
    copied = [rest for word, rest in stage if word == "COPY"]
    assert copied == ["--from=build /opt/faasmoe /opt/faasmoe"]
    assert [rest for word, rest in stage if word == "USER"] == ["65532:65532"]
    assert [word for word, _ in stage][-2:] in (["USER", "ENTRYPOINT"], ["EXPOSE", "ENTRYPOINT"])


def test_entrypoint_runs_module_without_shell(name: str) -> None:
    (entry,) = (rest for word, rest in last_stage(name) if word == "ENTRYPOINT")
    assert json.loads(entry) == ["python", "-m", MODULES[name]]
    assert not [word for word, _ in instructions(name) if word in ("CMD", "SHELL", "HEALTHCHECK")]


def test_installs_extra_of_its_name(name: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert name in extras
    installs = [rest for word, rest in instructions(name) if word == "RUN" and "pip" in rest]
    fill_cache = " &&      /opt/faasmoe/bin/python -m faasmoe_transformers.fast_import"
    assert installs[-1].removesuffix(fill_cache).endswith(f'".[{name}]"')


def test_operator_image_has_no_torch(name: str) -> None:
    text = FILES[name].read_text()
    assert ("TORCH_VERSION" in text) == (name != "operator")


def test_torch_version_matches_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (version,) = re.findall(r"^TORCH\s*\?= torch==([0-9.]+)$", makefile, flags=re.MULTILINE)
    for name in ("router", "expert"):
        assert f"ARG TORCH_VERSION={version}\n" in FILES[name].read_text()


def test_contains_no_url(name: str) -> None:
    assert "://" not in FILES[name].read_text()


def test_dockerignore_limits_build_context() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*"
    included = {line.removeprefix("!") for line in lines if line.startswith("!")}
    roots = {"operator", "router", "expert_fn", "kernels"}
    assert included == {"pyproject.toml", "README.md", "LICENSE", *roots}
    assert all((ROOT / path).exists() for path in included)


def test_checkov_finds_no_unexplained_failure(tmp_path: Path) -> None:
    for file in FILES.values():
        shutil.copy(file, tmp_path)
    assert failed_checks(tmp_path, framework="dockerfile") == []
