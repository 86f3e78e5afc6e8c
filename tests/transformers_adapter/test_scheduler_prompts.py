"""How the scheduler has a batch divided between prompts when the cache has no room for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.generation.continuous_batching.requests import RequestState

from faasmoe_transformers.scheduler import PreemptibleFIFOScheduler


def last_prompt_only(
    prompts: Sequence[tuple[str, int]], running: Sequence[str], max_tokens: int
) -> Mapping[str, int]:
    request_id, n_tokens = prompts[-1]
    return {request_id: min(n_tokens, max_tokens)}


def scheduler(can_store: Callable[[str], bool]) -> PreemptibleFIFOScheduler:
    """Return a scheduler of the prompts `a` and `b`, of which the latter is to be computed."""
    cache = SimpleNamespace(
        cache_tensor=torch.zeros(1),
        evict_cached_blocks=lambda: False,
        allow_block_sharing=False,
        use_prefix_sharing=False,
        max_blocks_per_request=0,
        max_decode_fast_path_length=0,
        read_cache_limit=None,
        pool=SimpleNamespace(try_to_free_sectors=lambda: None),
        compute_free_capacity=lambda: 1.0,
        can_store_request_tokens=lambda state, n_tokens: can_store(state.request_id),
        count_new_complete_blocks=lambda *_: 0,
    )
    made = PreemptibleFIFOScheduler(cache, 0.0, 8)
    made.divide_prompts = last_prompt_only
    for request_id in "ab":
        made.add_waiting_request(RequestState(request_id=request_id, initial_tokens=[1, 2, 3]))
    return made


def request_ids(scheduled: tuple[Any, ...]) -> list[str]:
    return [future.state.request_id for future in scheduled[0]]


def test_other_prompts_are_computed_if_the_cache_has_no_room_for_the_chosen() -> None:
    roomy, full = scheduler(lambda _: True), scheduler(lambda request_id: request_id == "a")
    assert request_ids(roomy.schedule_batch(16, 64)) == ["b"]
    assert request_ids(full.schedule_batch(16, 64)) == ["a"]


def test_batches_are_still_divided_after_an_error_of_the_second_attempt() -> None:
    def can_store(request_id: str) -> bool:
        if request_id == "a":
            raise MemoryError
        return False

    made = scheduler(can_store)
    with pytest.raises(MemoryError):
        made.schedule_batch(16, 64)
    assert made.divide_prompts is last_prompt_only
