"""The prefix cache, observed by the number of prompt tokens that are computed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from faasmoe_expert import malloc
from faasmoe_router.engine.batcher import (
    SALTED_TOKENS,
    TOKENS_PER_PAGE,
    CacheSalts,
    make_request_id,
)
from faasmoe_router.engine.engine import Engine
from faasmoe_router.engine.fair_queue import Share
from faasmoe_router.engine.generation import GenerationRequest
from faasmoe_router.engine.tokenizer import ModelTokenizer

DEADLINE_S = 120.0
Maker = Callable[..., Engine]
Greedy = Callable[[tuple[int, ...], int], list[int]]
GROUPS = {"a": "a", "b": "b,c", "c": "b,c", "d": "d"}


@pytest.fixture
def long_prompt(model_tokenizer: ModelTokenizer) -> tuple[int, ...]:
    prompt = tuple(model_tokenizer.encode("the quick brown fox jumps over the lazy dog " * 5))
    assert len(prompt) > 3 * TOKENS_PER_PAGE
    return prompt


async def _generate(
    engine: Engine, prompt: tuple[int, ...], tenant: str, cache_salt: str | None = None
) -> tuple[str, int]:
    """Return the text and the number of prompt tokens that were computed."""
    engine.computed_tokens.drain()
    request = GenerationRequest(prompt, 3, cache_salt=cache_salt)
    async with engine.generate([request], tenant=tenant) as generation:
        text = "".join([delta.text async for _, delta in generation])
    return text, engine.computed_tokens.drain()[tenant] - 2


def _run(engine: Engine, prompt: tuple[int, ...], *tenants: str) -> list[tuple[str, int]]:
    async def run() -> list[tuple[str, int]]:
        async with engine, asyncio.timeout(DEADLINE_S):
            return [await _generate(engine, prompt, tenant) for tenant in tenants]

    return asyncio.run(run())


def shared_engine(make_engine: Maker, groups: dict[str, str]) -> Engine:
    engine = make_engine()
    engine.set_tenants({name: Share() for name in groups}, groups)
    return engine


def test_prefix_cache_is_shared_within_a_group_only(
    make_engine: Maker,
    model_tokenizer: ModelTokenizer,
    greedy: Greedy,
    long_prompt: tuple[int, ...],
) -> None:
    """Tenant a asks twice, then d and b for the first time, then c, which shares with b."""
    found = _run(shared_engine(make_engine, GROUPS), long_prompt, "a", "a", "d", "b", "c", "a")
    whole = len(long_prompt)
    rest = whole - (whole - 1) // TOKENS_PER_PAGE * TOKENS_PER_PAGE
    assert [n for _, n in found] == [whole, rest, whole, whole, rest, rest]
    assert {text for text, _ in found} == {model_tokenizer.decode(greedy(long_prompt, 3))}


def test_requests_of_a_tenant_share_with_the_same_cache_salt_only(
    make_engine: Maker, long_prompt: tuple[int, ...]
) -> None:
    engine = shared_engine(make_engine, GROUPS)
    asked = [("b", None), ("b", "x"), ("b", "y"), ("b", "x"), ("c", "x"), ("a", "x"), ("b", None)]

    async def run() -> list[bool]:
        async with engine, asyncio.timeout(DEADLINE_S):
            found = [await _generate(engine, long_prompt, *who) for who in asked]
        assert len({text for text, _ in found}) == 1
        return [n < len(long_prompt) for _, n in found]

    assert asyncio.run(run()) == [False, False, False, True, True, False, True]


def test_cache_salt_only_changes_the_first_tokens() -> None:
    salts = CacheSalts(320)
    salts.set_groups({"a": "a"})
    prompt = list(range(40))
    unsalted, salted, other = (
        salts.salt_tokens(make_request_id("a", 7, salt), prompt) for salt in (None, "x", "y")
    )
    assert unsalted is not None
    assert salted is not None
    assert other is not None
    assert salted[0] == unsalted[0]
    assert salted[SALTED_TOKENS:] == unsalted[SALTED_TOKENS:] == prompt[SALTED_TOKENS:]
    assert len({tuple(unsalted), tuple(salted), tuple(other)}) == 3
    assert [token & 511 for token in salted] == [token & 511 for token in unsalted] == prompt
    assert all(0 <= token < 1 << 31 for token in salted)
    assert salts.salt_tokens(make_request_id("a", 8, "x"), prompt) == salted


def test_prefix_is_computed_again_after_its_memory_was_released(
    make_engine: Maker, long_prompt: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    reclaims: list[bool] = []
    monkeypatch.setattr("faasmoe_transformers.scheduler.PREFIX_CACHE_RECLAIM_DELAY_S", 0.0)
    monkeypatch.setattr(malloc, "trim_heap", lambda: reclaims.append(True))
    engine = shared_engine(make_engine, GROUPS)

    async def run() -> list[tuple[str, int]]:
        found = []
        async with engine, asyncio.timeout(DEADLINE_S):
            for n_times in (1, 2):
                found.append(await _generate(engine, long_prompt, "a"))
                while len(reclaims) < n_times:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        return found

    first, second = asyncio.run(run())
    assert second == first == (first[0], len(long_prompt))


def test_prompts_share_their_common_prefix(
    make_engine: Maker, long_prompt: tuple[int, ...]
) -> None:
    engine = shared_engine(make_engine, GROUPS)
    other = (*long_prompt[:40], *long_prompt[41:])

    async def run() -> None:
        async with engine, asyncio.timeout(DEADLINE_S):
            await _generate(engine, long_prompt, "a")
            _, n_computed = await _generate(engine, other, "a")
            assert n_computed == len(other) - TOKENS_PER_PAGE
            _, n_computed = await _generate(engine, long_prompt[1:], "a")
            assert n_computed == len(long_prompt) - 1

    asyncio.run(run())


def test_nothing_is_shared_without_tenants(
    make_engine: Maker, long_prompt: tuple[int, ...]
) -> None:
    found = _run(make_engine(), long_prompt, "", "")
    assert [n for _, n in found] == [len(long_prompt)] * 2


def test_tenant_without_a_group_shares_nothing(
    make_engine: Maker, long_prompt: tuple[int, ...]
) -> None:
    found = _run(shared_engine(make_engine, {"a": "a"}), long_prompt, "x", "x")
    assert [n for _, n in found] == [len(long_prompt)] * 2


def test_new_group_does_not_find_blocks_of_its_members_old_groups(
    make_engine: Maker, long_prompt: tuple[int, ...]
) -> None:
    engine = shared_engine(make_engine, {"a": "a", "b": "b"})
    whole = len(long_prompt)

    async def run() -> None:
        async with engine, asyncio.timeout(DEADLINE_S):
            await _generate(engine, long_prompt, "a")
            engine.set_tenants({}, {"a": "a,b", "b": "a,b"})
            assert (await _generate(engine, long_prompt, "b"))[1] == whole
            assert (await _generate(engine, long_prompt, "a"))[1] < whole
            engine.set_tenants({}, {"a": "a", "b": "b"})
            assert (await _generate(engine, long_prompt, "b"))[1] == whole

    asyncio.run(run())


def test_full_cache_evicts_prefixes_of_ended_requests(
    make_engine: Maker, model_tokenizer: ModelTokenizer
) -> None:
    engine = make_engine(max_num_seqs=2, max_num_batched_tokens=64, kv_cache_bytes=700_000)
    engine.set_tenants({"a": Share()}, {"a": "a"})
    prompts = [
        tuple(model_tokenizer.encode(f"{word} " * 60)[:200])
        for word in ("fox", "dog", "the", "lazy")
    ]

    async def run() -> None:
        async with engine, asyncio.timeout(DEADLINE_S):
            for prompt in prompts * 4:
                assert (await _generate(engine, prompt, "a"))[0]

    asyncio.run(run())


def test_groups_never_share_a_salted_token(model_tokenizer: ModelTokenizer) -> None:
    salts = CacheSalts(320)
    salts.set_groups({f"t{i}": f"t{i}" for i in range(64)})
    first: set[Any] = set()
    for i in range(64):
        for token in (0, 1, 318, 319):
            salted = salts.salt_tokens(f"t{i}/1", [token, 7])
            assert salted is not None
            assert salted[1] == 7
            assert 320 <= salted[0] < 1 << 31
            first.add(salted[0])
    assert len(first) == 64 * 4
    assert salts.salt_tokens("unknown/1", [1]) is None


def test_groups_beyond_the_salt_range_share_nothing() -> None:
    salts = CacheSalts((1 << 30) - 1)
    salts.set_groups({"a": "a", "b": "b"})
    assert salts.salt_tokens("a/1", [5]) == [5 | 1 << 30]
    assert salts.salt_tokens("b/1", [5]) is None
