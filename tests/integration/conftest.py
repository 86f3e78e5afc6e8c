"""The exact demo model, made once and kept, and small tensors computed by one thread."""

from pathlib import Path

import pytest
import torch

from faasmoe_router.checkpoint.demo import make_demo_model


@pytest.fixture(scope="session", autouse=True)
def _single_torch_thread() -> None:
    """Tiny tensors gain nothing by threads, and lose ten times on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def exact_demo_model(request: pytest.FixtureRequest) -> Path:
    """SmolLM2-135M cut into experts that are all active: logits equal the dense model's."""
    assert request.config.cache is not None
    return make_demo_model(request.config.cache.mkdir("demo-models") / "exact", exact=True)
