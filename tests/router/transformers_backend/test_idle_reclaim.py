import re
from pathlib import Path

import pytest
import torch

from faasmoe_router.transformers_backend.idle_reclaim import IdleMemoryReclaimer, release_pages

SIZE_BYTES = 64 << 20


def _resident_bytes() -> int:
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def test_zeros_are_not_resident_and_still_zeros() -> None:
    zeros = torch.ones(SIZE_BYTES, dtype=torch.uint8).zero_()
    before = _resident_bytes()
    release_pages(zeros)
    assert before - _resident_bytes() > 0.9 * SIZE_BYTES
    zeros[SIZE_BYTES // 2] = 7
    assert int(zeros.sum(dtype=torch.int64)) == 7


def test_what_lies_around_a_tensor_is_left_alone() -> None:
    around = torch.ones(3 << 12, dtype=torch.uint8)
    inner = around[100:-100].zero_()
    release_pages(inner)
    assert int(around.sum(dtype=torch.int64)) == 200


@pytest.mark.parametrize("size", [0, 1, 4096])
def test_a_tensor_smaller_than_its_pages_is_left_alone(size: int) -> None:
    release_pages(torch.zeros(size, dtype=torch.uint8))


def test_a_cache_is_given_back_once_when_nothing_was_asked_for_a_while() -> None:
    cache = torch.zeros(SIZE_BYTES, dtype=torch.uint8)
    memory = IdleMemoryReclaimer(cache, evict_cached_blocks=lambda: None, idle_delay_s=1.0)
    memory.observe(10.0, is_idle=False)
    cache.fill_(1)
    for now_s in (10.1, 11.0):  # idle since 10.1
        memory.observe(now_s, is_idle=True)
    assert cache.all()
    before = _resident_bytes()
    memory.observe(11.1, is_idle=True)
    assert before - _resident_bytes() > 0.9 * SIZE_BYTES
    cache.fill_(2)  # not by a request: it is not looked at again
    memory.observe(20.0, is_idle=True)
    assert cache.all()


def test_what_others_keep_is_given_back_with_it() -> None:
    given = []
    memory = IdleMemoryReclaimer(torch.zeros(1), evict_cached_blocks=lambda: None, idle_delay_s=1.0)
    memory.on_reclaim = lambda: given.append(1)
    for now_s, is_idle in ((0.0, False), (0.5, True), (1.4, True), (1.5, True), (9.0, True)):
        memory.observe(now_s, is_idle=is_idle)
    assert given == [1]


def test_a_request_keeps_the_cache_however_long_it_takes() -> None:
    cache = torch.ones(SIZE_BYTES, dtype=torch.uint8)
    memory = IdleMemoryReclaimer(cache, evict_cached_blocks=lambda: None, idle_delay_s=1.0)
    for now_s, is_idle in ((0.0, True), (0.5, False), (5.0, False), (5.1, True), (6.0, True)):
        memory.observe(now_s, is_idle=is_idle)
    assert cache.all()
