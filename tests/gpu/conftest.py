"""What needs a CUDA device: marked `gpu`, and skipped with the reason where there is none.

With EMULATED_CUDA=1 it runs on an emulated one (tests/integration/emulated), but for what asks for
the fixture `real`: memory that processes share, and what only a device's own kernels can show.
"""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_chat import save_tiny_chat_model

import faasmoe_expert.device as resolving
from faasmoe_expert.functions.transfer import Uploader, uploader_for

HERE = Path(__file__).parent
EMULATED = os.environ.get("EMULATED_CUDA") == "1"

if EMULATED:
    from emulated.cuda import install

    DEVICE = install()
    SUPPORT = HERE.parent / "integration"  # also for processes that tests start
    paths = [str(SUPPORT / "emulated" / "site"), str(SUPPORT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
else:
    DEVICE = torch.device("cuda")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    why_none = resolving.cuda_unavailable_reason()
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if why_none:
                item.add_marker(pytest.mark.skip(reason=why_none))


@pytest.fixture(scope="session")
def cuda() -> torch.device:
    return DEVICE


@pytest.fixture
def real() -> None:
    """Skips a test that needs a real device."""
    if EMULATED:
        pytest.skip("needs a real device")


@pytest.fixture
def emulated() -> None:
    """Skips a test of races and waits that only the emulated device detects."""
    if not EMULATED:
        pytest.skip("needs the emulated device: `make test-emulated`")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_chat_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def uploader(cuda: torch.device) -> Uploader:
    found = uploader_for(cuda)
    assert found is not None
    return found


@pytest.fixture(autouse=True)
def release_device_memory() -> Iterator[None]:
    """Frees a test's device memory, since other tests count bytes."""
    yield
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
