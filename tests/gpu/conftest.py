"""What needs a CUDA device: marked `gpu`, and skipped with the reason where there is none."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from faasmoe_expert.device import why_no_cuda
from faasmoe_expert.functions.upload import Uploader, uploader_to

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    why_none = why_no_cuda()
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if why_none:
                item.add_marker(pytest.mark.skip(reason=why_none))


@pytest.fixture(scope="session")
def cuda() -> torch.device:
    return torch.device("cuda")


@pytest.fixture
def uploader(cuda: torch.device) -> Uploader:
    found = uploader_to(cuda)
    assert found is not None
    return found


@pytest.fixture(autouse=True)
def gives_back() -> Iterator[None]:
    """Each test leaves the device as it found it: the next ones count bytes."""
    yield
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
