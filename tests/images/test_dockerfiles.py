"""Static checks of the Dockerfiles; building and running them needs a builder."""

import json
import re
import shutil
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from security_checks import failed_checks

ROOT = Path(__file__).parents[2]
FILES = {name: ROOT / f"Dockerfile.{name}" for name in ("operator", "router", "expert", "gateway")}
MODULES = {
    "operator": "faasmoe_operator.kube",
    "router": "faasmoe_router",
    "expert": "faasmoe_expert",
    "gateway": "faasmoe_gateway",
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
    assert f"-r /locks/{name}.txt" in FILES[name].read_text()


def test_installs_nothing_that_is_not_locked(name: str) -> None:
    runs = [rest for word, rest in instructions(name) if word == "RUN" and "pip" in rest]
    installs = [
        command for run in runs for command in run.split("&&") if " install " in f"{command} "
    ]
    commands = [command for command in installs if "apt-get" not in command]
    assert len(commands) >= 3
    for command in commands:
        assert "--no-deps" in command
        assert "--require-hashes" in command or "/wheels/faasmoe-*.whl" in command
        assert "--extra-index-url" not in command  # which could supply any package


LOCKS = sorted(path.stem for path in (ROOT / "requirements").glob("*.txt"))


@pytest.mark.parametrize("lock", LOCKS)
def test_lock_names_every_package_by_hash(lock: str) -> None:
    text = (ROOT / "requirements" / f"{lock}.txt").read_text()
    comment, *lines = text.splitlines()
    assert comment.startswith("#")
    for line in lines:
        assert re.fullmatch(r"[a-z0-9-]+==\S+( --hash=sha256:[0-9a-f]{64})+", line), line
    assert "://" not in text


@pytest.mark.parametrize("lock", ["operator", "gateway", "expert", "router", "ci"])
def test_lock_satisfies_the_project(lock: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    names = ["operator", "router", "expert", "gateway"] if lock == "ci" else [lock]
    required = [Requirement(text) for name in names for text in extras[name]]
    if lock == "router":
        required += [Requirement(t) for name in ("expert", "gateway") for t in extras[name]]
    locked = locked_versions(lock)
    for requirement in required:
        name = canonicalize_name(requirement.name)
        if name not in ("faasmoe", "torch"):
            assert name in locked, name
            assert requirement.specifier.contains(locked[name]), requirement


def locked_versions(lock: str) -> dict[str, str]:
    text = (ROOT / "requirements" / f"{lock}.txt").read_text()
    return dict(re.findall(r"^([a-z0-9-]+)==(\S+)", text, flags=re.MULTILINE))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_locked_torch_is_that_of_the_makefile(device: str) -> None:
    version = locked_versions(f"torch-{device}")["torch"]
    assert version.removesuffix("+cpu") == makefile_torch_version()


def test_images_of_operator_and_gateway_have_no_torch(name: str) -> None:
    text = FILES[name].read_text()
    assert ("/locks/torch-" in text) == (name not in ("operator", "gateway"))
    assert "torch" not in locked_versions("operator").keys() | locked_versions("gateway").keys()
    assert "kubernetes" not in locked_versions("gateway")


def makefile_torch_version() -> str:
    makefile = (ROOT / "Makefile").read_text()
    (version,) = re.findall(r"^TORCH\s*\?= torch==([0-9.]+)$", makefile, flags=re.MULTILINE)
    return str(version)


def test_contains_no_url(name: str) -> None:
    assert "://" not in FILES[name].read_text()


def test_dockerignore_limits_build_context() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*"
    included = {line.removeprefix("!") for line in lines if line.startswith("!")}
    roots = {"operator", "router", "expert_fn", "kernels", "gateway", "requirements"}
    assert included == {"pyproject.toml", "README.md", "LICENSE", *roots}
    assert all((ROOT / path).exists() for path in included)


def test_checkov_finds_no_unexplained_failure(tmp_path: Path) -> None:
    for file in FILES.values():
        shutil.copy(file, tmp_path)
    assert failed_checks(tmp_path, framework="dockerfile") == []
