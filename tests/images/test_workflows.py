"""Release workflows publish what is signed, by the digest that was pushed, and hold few rights."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

FOLDER = Path(__file__).parents[2] / ".github" / "workflows"
NAMES = sorted(path.name for path in FOLDER.glob("*.yml"))
PUSHING = ("chart.yml", "images.yml")


def workflow(name: str) -> dict[Any, Any]:
    loaded: dict[Any, Any] = yaml.safe_load((FOLDER / name).read_text())
    return loaded


def steps(name: str) -> list[dict[str, Any]]:
    return [step for job in workflow(name)["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("name", NAMES)
def test_every_action_has_a_version_and_checkouts_keep_no_credentials(name: str) -> None:
    for step in steps(name):
        if "uses" in step:
            assert re.fullmatch(r"[\w.-]+/[\w./-]+@v?[0-9a-f.]+", step["uses"])
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


@pytest.mark.parametrize("name", NAMES)
def test_rights_are_named_and_contents_are_only_read(name: str) -> None:
    assert workflow(name)["permissions"]["contents"] == "read"


@pytest.mark.parametrize("name", PUSHING)
def test_what_is_pushed_is_signed_by_its_digest(name: str) -> None:
    assert workflow(name)["permissions"]["id-token"] == "write"
    runs = [step.get("run", "") for step in steps(name)]
    (signing,) = (run for run in runs if "cosign sign" in run)
    (step_id,) = re.findall(r"@\$\{\{ steps\.(\w+)\.outputs\.digest \}\}", signing)
    assert step_id in {step.get("id") for step in steps(name)}


def test_images_have_the_tag_that_the_chart_asks_for() -> None:
    (version,) = {
        re.sub(r".*version=", "", line).partition('"')[0]
        for step in steps("images.yml")
        for line in step.get("run", "").splitlines()
        if "version=" in line
    }
    package = next(
        step["run"] for step in steps("chart.yml") if "helm package" in step.get("run", "")
    )
    assert f'version="{version}"' in package
    assert '--app-version "$version"' in package
    build = next(step for step in steps("images.yml") if step.get("id") == "build")
    assert build["with"]["tags"].endswith(":${{ steps.base.outputs.version }}")


@pytest.mark.parametrize("name", NAMES)
def test_no_failure_is_hidden_by_a_pipe(name: str) -> None:
    for step in steps(name):
        if re.search(r"\| *tee\b", step.get("run", "")):
            assert "set -o pipefail" in step["run"]


def test_the_chart_is_pushed_beside_the_images() -> None:
    chart = workflow("chart.yml")["jobs"]["chart"]["env"]["REPOSITORY"]
    image = workflow("images.yml")["jobs"]["images"]["env"]["IMAGE"]
    assert chart.rpartition("/")[0] == image.rpartition("/")[0]
