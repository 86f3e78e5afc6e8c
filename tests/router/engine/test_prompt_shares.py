"""Division of a batch's tokens between prompts of tenants."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faasmoe_router.engine.prompt_shares import PendingPrompt, divide_prompt_tokens

MAX_TOKENS = 512
PART = 64  # an eighth


def divide(
    *prompts: tuple[str, str, int], running: str = "", weights: dict[str, float] | None = None
) -> dict[str, int]:
    """Divide between (request, tenant, tokens), beside the tenants named by a letter each."""
    return dict(
        divide_prompt_tokens(
            [PendingPrompt(*prompt) for prompt in prompts],
            running,
            max_tokens=MAX_TOKENS,
            weight=lambda tenant: (weights or {}).get(tenant, 1.0),
        )
    )


def test_one_tenant_has_whole_batches_in_order() -> None:
    assert divide(("1", "a", 300), ("2", "a", 300), ("3", "a", 9)) == {"1": 300, "2": 212}
    assert divide(("1", "a", 600), running="a" * 12) == {"1": 500}


def test_short_prompt_does_not_wait_for_the_long_ones_of_another_tenant() -> None:
    flood = [(f"f{i}", "flood", 8000) for i in range(7)]
    assert divide(*flood, ("q", "quiet", 10)) == {"q": 10, "f0": PART}


def test_sequence_of_another_tenant_shortens_the_batch() -> None:
    assert divide(("1", "a", 300), running="b") == {"1": PART}
    assert divide(("1", "a", 300), ("2", "c", 200), running="b") == {"1": PART, "2": PART}


def test_tenants_that_all_ask_for_much_share_whole_batches_by_weight() -> None:
    prompts = (("1", "a", 900), ("2", "b", 900))
    assert divide(*prompts) == {"1": 256, "2": 256}
    assert divide(*prompts, weights={"a": 3.0}) == {"2": 128, "1": 384}
    assert divide(("1", "a", 900), ("2", "b", 100)) == {"2": 100, "1": 412}


def test_full_batch_of_running_sequences_leaves_nothing() -> None:
    assert divide(("1", "a", 9), running="b" * MAX_TOKENS) == {}


@pytest.mark.parametrize("max_tokens", [1, 2, 12])
def test_smallest_batches_have_room_for_a_token(max_tokens: int) -> None:
    prompts = [PendingPrompt(name, name, 100) for name in "ab"]
    parts = divide_prompt_tokens(prompts, (), max_tokens=max_tokens, weight=lambda _: 1.0)
    assert 0 < sum(parts.values()) <= max_tokens


def test_weights_that_change_meanwhile_do_no_harm() -> None:
    """They are read on the batcher's thread, while the event loop may replace them."""
    weights = iter((1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 1.0, 1.0))
    prompts = [PendingPrompt(name, name, 900) for name in "ab"]
    parts = divide_prompt_tokens(prompts, (), max_tokens=MAX_TOKENS, weight=lambda _: next(weights))
    assert parts == {"a": 256, "b": 256}


TENANTS = "abc"


@given(
    st.lists(st.tuples(st.sampled_from(TENANTS), st.integers(1, 3000)), min_size=1, max_size=12),
    st.lists(st.sampled_from(TENANTS), max_size=40),
    st.fixed_dictionaries({tenant: st.floats(0.1, 10.0) for tenant in TENANTS}),
    st.integers(1, 1024),
)
def test_batch_is_never_exceeded_nor_empty_and_parts_are_in_order(
    asked: list[tuple[str, int]], running: list[str], weights: dict[str, float], max_tokens: int
) -> None:
    prompts = [PendingPrompt(str(i), tenant, n) for i, (tenant, n) in enumerate(asked)]
    parts = divide_prompt_tokens(
        prompts, running, max_tokens=max_tokens, weight=weights.__getitem__
    )
    room = max(0, max_tokens - len(running))
    assert sum(parts.values()) <= room
    assert bool(parts) == bool(room)
    for tenant in TENANTS:
        own = [p for p in prompts if p.tenant == tenant]
        got = [parts.get(p.request_id, 0) for p in own]
        assert all(0 <= n <= p.n_tokens for n, p in zip(got, own, strict=True))
        unfinished = next((i for i, p in enumerate(own) if got[i] < p.n_tokens), len(own))
        assert not any(got[unfinished + 1 :])  # later ones wait for the first
    if len({p.tenant for p in prompts} | set(running)) == 1:
        assert sum(parts.values()) == min(room, sum(n for _, n in asked))
