"""Every MoEModel in README, docs and examples, validated by pydantic and by the CRD."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from faasmoe_operator.api.v1alpha1.moemodel import parse_moemodel
from faasmoe_operator.api.v1alpha1.validation import kubernetes_problems, process_platform_problems

ROOT = Path(__file__).parents[3]
ApiServer = Any  # conftest's; a test module cannot import it
IS_MOEMODEL = re.compile(r"^kind: MoEModel$", re.MULTILINE)
YAML_BLOCK = re.compile(r"^```yaml\n(.*?)^```", re.MULTILINE | re.DOTALL)


def documented_moemodels() -> dict[str, str]:
    """Return the YAML texts by their location."""
    examples = {str(p.relative_to(ROOT)): p.read_text() for p in (ROOT / "examples").glob("*.yaml")}
    texts = {place: text for place, text in examples.items() if IS_MOEMODEL.search(text)}
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    for page in pages:
        for index, block in enumerate(YAML_BLOCK.findall(page.read_text())):
            if IS_MOEMODEL.search(block):
                texts[f"{page.relative_to(ROOT)}-{index}"] = block
    return texts


DOCUMENTED = documented_moemodels()


def test_finds_documented_moemodels() -> None:
    assert {"examples/demo.yaml", "examples/moemodel.yaml", "README.md-0"} <= set(DOCUMENTED)


@pytest.mark.parametrize("place", DOCUMENTED)
def test_documented_moemodels_are_valid_on_a_platform(place: str) -> None:
    model = parse_moemodel(DOCUMENTED[place], name=place)
    assert process_platform_problems(model) == [] or kubernetes_problems(model) == []


@pytest.mark.parametrize("place", DOCUMENTED)
def test_crd_accepts_exactly_the_moemodels_for_kubernetes(
    api_server: ApiServer, place: str
) -> None:
    is_for_kubernetes = kubernetes_problems(parse_moemodel(DOCUMENTED[place], name=place)) == []
    assert (api_server.problems(yaml.safe_load(DOCUMENTED[place])) == []) == is_for_kubernetes


def test_kubernetes_example_is_valid_on_kubernetes(api_server: ApiServer) -> None:
    model = parse_moemodel(DOCUMENTED["examples/moemodel.yaml"], name="example")
    assert kubernetes_problems(model) == []
    assert model.spec.tenants
    assert model.spec.networking.ingress
