"""Fixtures: the router's engines, and the exact demo model, kept in pytest's cache."""

from pathlib import Path

import pytest
from engines import ENGINES, RouterEngine

from faasmoe_router.checkpoint.demo import make_demo_model, moefication


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest) -> RouterEngine:
    """Each engine of the router in turn; vLLM where FAASMOE_VLLM_PYTHON names its environment."""
    selected: RouterEngine = request.param
    return selected


@pytest.fixture(scope="session")
def exact_demo_model(request: pytest.FixtureRequest) -> Path:
    """SmolLM2-135M split into experts that are all active, with the logits of the dense model.

    Short answers to the calibration's prompts suffice: they only decide which neurons are together.
    """
    assert request.config.cache is not None
    folder = request.config.cache.mkdir("demo-models") / "exact-of-short-answers"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moefication, "ANSWER_TOKENS", 8)
        return make_demo_model(folder, exact=True)
