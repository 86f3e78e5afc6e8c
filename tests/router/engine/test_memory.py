import re
from pathlib import Path

import pytest
import torch

from faasmoe_router.engine.memory import release_zeros

SIZE_BYTES = 64 << 20


def _resident_bytes() -> int:
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def test_zeros_are_not_resident_and_still_zeros() -> None:
    zeros = torch.ones(SIZE_BYTES, dtype=torch.uint8).zero_()
    before = _resident_bytes()
    release_zeros(zeros)
    assert before - _resident_bytes() > 0.9 * SIZE_BYTES
    zeros[SIZE_BYTES // 2] = 7
    assert int(zeros.sum(dtype=torch.int64)) == 7


def test_what_lies_around_a_tensor_is_left_alone() -> None:
    around = torch.ones(3 << 12, dtype=torch.uint8)
    inner = around[100:-100].zero_()
    release_zeros(inner)
    assert int(around.sum(dtype=torch.int64)) == 200


@pytest.mark.parametrize("size", [0, 1, 4096])
def test_a_tensor_smaller_than_its_pages_is_left_alone(size: int) -> None:
    release_zeros(torch.zeros(size, dtype=torch.uint8))
