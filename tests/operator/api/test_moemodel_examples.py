"""Every MoEModel that is shown to users, read by pydantic and by the CRD."""

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
YAML_BLOCK = re.compile(r"^```yaml\n(.*?)^```", re.MULTILINE | re.DOTALL)


def documented_moemodels() -> dict[str, str]:
    """The texts by where they stand."""
    texts = {str(p.relative_to(ROOT)): p.read_text() for p in (ROOT / "examples").glob("*.yaml")}
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    for page in pages:
        for index, block in enumerate(YAML_BLOCK.findall(page.read_text())):
            if re.search(r"^kind: MoEModel$", block, re.MULTILINE):
                texts[f"{page.relative_to(ROOT)}-{index}"] = block
    return texts


DOCUMENTED = documented_moemodels()


def test_there_are_some() -> None:
    assert {"examples/demo.yaml", "examples/moemodel.yaml", "README.md-0"} <= set(DOCUMENTED)


@pytest.mark.parametrize("place", DOCUMENTED)
def test_serves_on_one_of_the_platforms(place: str) -> None:
    model = parse_moemodel(DOCUMENTED[place], name=place)
    assert process_platform_problems(model) == [] or kubernetes_problems(model) == []


@pytest.mark.parametrize("place", DOCUMENTED)
def test_the_crd_takes_what_is_for_kubernetes_and_only_that(
    api_server: ApiServer, place: str
) -> None:
    is_for_kubernetes = kubernetes_problems(parse_moemodel(DOCUMENTED[place], name=place)) == []
    assert (api_server.problems(yaml.safe_load(DOCUMENTED[place])) == []) == is_for_kubernetes


def test_the_example_for_kubernetes_is_one(api_server: ApiServer) -> None:
    model = parse_moemodel(DOCUMENTED["examples/moemodel.yaml"], name="example")
    assert kubernetes_problems(model) == []
    assert model.spec.tenants
    assert model.spec.networking.ingress
