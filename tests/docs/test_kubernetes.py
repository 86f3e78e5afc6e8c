"""Checks docs/kubernetes against the code: example MoEModels, condition reasons, alerts, links."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from faasmoe_operator.api.v1alpha1 import MoEModel
from faasmoe_operator.kube.store_summary import StoreFailureReason

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "kubernetes").glob("*.md"))
TROUBLESHOOTING = (ROOT / "docs" / "kubernetes" / "troubleshooting.md").read_text()
REASON_ARGUMENTS = {
    "condition_true": 0,
    "condition_false": 0,
    "condition_unknown": 0,
    "PodFailure": 0,
    "ConditionState": 1,
}
"""Position of the reason among the arguments of each function that sets a condition."""


def yaml_blocks(page: Path) -> Iterator[dict[str, Any]]:
    for text in re.findall(r"^```yaml\n(.*?)^```", page.read_text(), flags=re.S | re.M):
        yield from yaml.safe_load_all(text)


MODELS = [
    pytest.param(block, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, block in enumerate(yaml_blocks(page))
    if block.get("kind", "MoEModel") == "MoEModel"
]


@pytest.mark.parametrize("block", MODELS)
def test_examples_are_valid_moemodels(block: dict[str, Any]) -> None:
    source = {"source": "hf://o/m"}
    MoEModel.from_object(
        {
            "apiVersion": "faasmoe.dev/v1alpha1",
            "kind": "MoEModel",
            "metadata": {"name": "example"},
            **block,
            "spec": {"model": source, **block["spec"]},
        }
    )


def condition_reasons() -> set[str]:
    """Return the condition reasons in the source of the operator."""
    reasons = {reason.value for reason in StoreFailureReason}
    for module in (ROOT / "operator" / "faasmoe_operator" / "kube").glob("*.py"):
        for node in ast.walk(ast.parse(module.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                position = REASON_ARGUMENTS.get(node.func.id)
                if position is None or len(node.args) <= position:
                    continue
                argument = node.args[position]
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    reasons.add(argument.value)
    return reasons - {"Ready"}


def test_finds_reasons_in_source() -> None:
    assert {"Suspended", "ImagePullBackOff", "NoTraffic", "Prepared"} <= condition_reasons()


@pytest.mark.parametrize("reason", sorted(condition_reasons()))
def test_reason_is_documented(reason: str) -> None:
    assert f"`{reason}`" in TROUBLESHOOTING


def test_alerts_are_documented() -> None:
    files = (ROOT / "charts" / "faasmoe" / "alerts").glob("*.yaml")
    alerts = {alert["name"] for file in files for alert in yaml.safe_load(file.read_text())}
    assert alerts
    headings = set(re.findall(r"^### (Faasmoe\w+)$", TROUBLESHOOTING, flags=re.M))
    assert headings == alerts


def outages() -> list[list[str]]:
    """Return the rows of the table of outages: outage, what users see, alerts, after, test."""
    _, _, table = TROUBLESHOOTING.partition("| outage |")
    rows = table.partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_every_outage_that_is_played_has_a_row() -> None:
    played = ast.parse((ROOT / "tests" / "cluster" / "test_outages.py").read_text()).body
    tests = {node.name for node in played if isinstance(node, ast.FunctionDef)}
    named = {name for row in outages() for name in re.findall(r"`(test_\w+)`", row[-1])}
    assert named == {name for name in tests if name.startswith("test_")}


@pytest.mark.parametrize("row", outages(), ids=[row[0] for row in outages()])
def test_outages_alert_after_the_minutes_of_the_rules(row: list[str]) -> None:
    files = (ROOT / "charts" / "faasmoe" / "alerts").glob("*.yaml")
    waits = {alert["name"]: alert["for"] for f in files for alert in yaml.safe_load(f.read_text())}
    alerts = re.findall(r"Faasmoe\w+", row[2])
    minutes = [int(text) for text in re.findall(r"(\d+)(?: to \d+)? min", row[3])]
    assert len(alerts) == len(minutes)
    for alert, after in zip(alerts, minutes, strict=True):
        # A rule holds for its time once its expression does, at most a minute after the outage.
        assert after - int(waits[alert].removesuffix("m")) in (0, 1)


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_links_resolve(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []
