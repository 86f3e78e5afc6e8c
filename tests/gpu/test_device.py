"""Resolution of device names on a machine with a device."""

import pytest
import torch

from faasmoe_expert.config import SandboxConfigError
from faasmoe_expert.device import is_cuda_possible, resolve_device

pytestmark = pytest.mark.usefixtures("real")


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_resolves_a_device_and_initializes_it(name: str) -> None:
    assert resolve_device(name).type == "cuda"
    assert torch.cuda.memory_reserved() > 0  # by the trial allocation
    assert is_cuda_possible()


def test_rejects_a_device_index_out_of_range() -> None:
    count = torch.cuda.device_count()
    with pytest.raises(SandboxConfigError, match=f"expected an index below {count}"):
        resolve_device(f"cuda:{count}")
