"""Fixtures: the router's engines, the exact demo model in pytest's cache, a single torch thread."""

from pathlib import Path

import pytest
import torch
from engines import ENGINES, RouterEngine

from faasmoe_router.checkpoint.demo import make_demo_model


@pytest.fixture(scope="session", autouse=True)
def _single_torch_thread() -> None:
    """Use one thread: for tiny tensors, more are up to ten times slower on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest) -> RouterEngine:
    """Each engine of the router in turn; vLLM where FAASMOE_VLLM_PYTHON names its environment."""
    selected: RouterEngine = request.param
    return selected


@pytest.fixture(scope="session")
def exact_demo_model(request: pytest.FixtureRequest) -> Path:
    """SmolLM2-135M split into experts that are all active, with the logits of the dense model."""
    assert request.config.cache is not None
    return make_demo_model(request.config.cache.mkdir("demo-models") / "exact", exact=True)
