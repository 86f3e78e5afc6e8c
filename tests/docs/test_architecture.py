"""docs/architecture.md names modules that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
ROOTS = (
    "",
    "docs",
    "expert_fn",
    "gateway",
    "gateway/faasmoe_gateway",
    "expert_fn/faasmoe_expert",
    "expert_fn/faasmoe_transformers",
    "operator",
    "operator/faasmoe_operator",
    "router/faasmoe_router",
    "router/faasmoe_router/dispatch",
)
MODULES = sorted(set(re.findall(r"`([a-z_0-9/]+(?:\.py|/))`", TEXT)))


@pytest.mark.parametrize("module", MODULES)
def test_module_exists(module: str) -> None:
    assert any((ROOT / root / module).exists() for root in ROOTS)


def test_modules_are_found_in_the_text() -> None:
    assert len(MODULES) > 40
