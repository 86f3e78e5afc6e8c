"""Fixtures: the router's engines."""

import pytest
from engines import ENGINES, RouterEngine


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest) -> RouterEngine:
    """Each engine of the router in turn; vLLM where FAASMOE_VLLM_PYTHON names its environment."""
    selected: RouterEngine = request.param
    return selected
