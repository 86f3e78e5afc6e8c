"""What a device's name comes to where there is one."""

import pytest
import torch

from faasmoe_expert.config import SandboxConfigError
from faasmoe_expert.device import is_cuda_possible, resolve_device

pytestmark = pytest.mark.usefixtures("real")


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_a_device_is_found_and_in_use(name: str) -> None:
    assert resolve_device(name).type == "cuda"
    assert torch.cuda.memory_reserved() > 0  # by what was tried on it
    assert is_cuda_possible()


def test_an_index_beyond_the_last_is_refused() -> None:
    count = torch.cuda.device_count()
    with pytest.raises(SandboxConfigError, match=f"expected an index below {count}"):
        resolve_device(f"cuda:{count}")
