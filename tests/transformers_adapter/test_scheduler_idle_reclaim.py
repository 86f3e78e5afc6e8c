"""Release of an idle KV cache's memory, measured as resident memory of the process."""

import re
from pathlib import Path

import pytest
import torch

from faasmoe_transformers.scheduler import IdleMemoryReclaimer
from faasmoe_transformers.tensor_pages import release_pages

SIZE_BYTES = 64 << 20


def _resident_bytes() -> int:
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def test_released_pages_are_not_resident_and_read_as_zeros() -> None:
    zeros = torch.ones(SIZE_BYTES, dtype=torch.uint8).zero_()
    before = _resident_bytes()
    release_pages(zeros)
    assert before - _resident_bytes() > 0.9 * SIZE_BYTES
    zeros[SIZE_BYTES // 2] = 7
    assert int(zeros.sum(dtype=torch.int64)) == 7


def test_memory_around_a_tensor_is_not_released() -> None:
    around = torch.ones(3 << 12, dtype=torch.uint8)
    inner = around[100:-100].zero_()
    release_pages(inner)
    assert int(around.sum(dtype=torch.int64)) == 200


@pytest.mark.parametrize("size", [0, 1, 4096])
def test_tensor_smaller_than_a_page_is_not_released(size: int) -> None:
    release_pages(torch.zeros(size, dtype=torch.uint8))


def test_idle_cache_is_released_once_after_the_delay() -> None:
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
    cache.fill_(2)  # not written by a request, so it is not released again
    memory.observe(20.0, is_idle=True)
    assert cache.all()


def test_on_reclaim_is_called_once_per_idle_period() -> None:
    reclaims = []
    memory = IdleMemoryReclaimer(torch.zeros(1), evict_cached_blocks=lambda: None, idle_delay_s=1.0)
    memory.on_reclaim = lambda: reclaims.append(1)
    for now_s, is_idle in ((0.0, False), (0.5, True), (1.4, True), (1.5, True), (9.0, True)):
        memory.observe(now_s, is_idle=is_idle)
    assert reclaims == [1]


def test_cache_is_not_released_while_a_request_is_present() -> None:
    cache = torch.ones(SIZE_BYTES, dtype=torch.uint8)
    memory = IdleMemoryReclaimer(cache, evict_cached_blocks=lambda: None, idle_delay_s=1.0)
    for now_s, is_idle in ((0.0, True), (0.5, False), (5.0, False), (5.1, True), (6.0, True)):
        memory.observe(now_s, is_idle=is_idle)
    assert cache.all()
