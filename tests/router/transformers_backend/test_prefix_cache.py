"""The cache of prompts' beginnings, observed: what is computed twice and what is not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from faasmoe_expert import malloc
from faasmoe_router.engine.cache_config import TOKENS_PER_PAGE
from faasmoe_router.engine.engine import Engine
from faasmoe_router.engine.fair_queue import Share
from faasmoe_router.engine.generation import GenerationRequest
from faasmoe_router.engine.tokenizer import ModelTokenizer
from faasmoe_router.transformers_backend.prefix_cache import CacheSalts

DEADLINE_S = 20.0
Maker = Callable[..., Engine]
Greedy = Callable[[tuple[int, ...], int], list[int]]
GROUPS = {"a": "a", "b": "b,c", "c": "b,c", "d": "d"}


@pytest.fixture
def long_prompt(codec: ModelTokenizer) -> tuple[int, ...]:
    prompt = tuple(codec.encode("the quick brown fox jumps over the lazy dog " * 5))
    assert len(prompt) > 3 * TOKENS_PER_PAGE
    return prompt


async def _generate(engine: Engine, prompt: tuple[int, ...], tenant: str) -> tuple[str, int]:
    """Return the text, and how many tokens of the prompt were computed for it."""
    engine.computed_tokens.drain()
    request = GenerationRequest(prompt, 3)
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


def test_a_tenant_finds_its_own_beginnings_and_no_other_s(
    make_engine: Maker, codec: ModelTokenizer, greedy: Greedy, long_prompt: tuple[int, ...]
) -> None:
    """a asks twice, then d and b for the first time, then c, which shares with b."""
    found = _run(shared_engine(make_engine, GROUPS), long_prompt, "a", "a", "d", "b", "c", "a")
    whole = len(long_prompt)
    rest = whole - (whole - 1) // TOKENS_PER_PAGE * TOKENS_PER_PAGE
    assert [n for _, n in found] == [whole, rest, whole, whole, rest, rest]
    assert {text for text, _ in found} == {codec.decode(greedy(long_prompt, 3))}


def test_a_beginning_whose_memory_was_given_back_is_computed_again(
    make_engine: Maker, long_prompt: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    given_back: list[bool] = []
    monkeypatch.setattr(
        "faasmoe_router.transformers_backend.scheduler.PREFIX_CACHE_RECLAIM_DELAY_S", 0.0
    )
    monkeypatch.setattr(malloc, "give_back", lambda: given_back.append(True))
    engine = shared_engine(make_engine, GROUPS)

    async def run() -> list[tuple[str, int]]:
        found = []
        async with engine, asyncio.timeout(DEADLINE_S):
            for n_times in (1, 2):
                found.append(await _generate(engine, long_prompt, "a"))
                while len(given_back) < n_times:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        return found

    first, second = asyncio.run(run())
    assert second == first == (first[0], len(long_prompt))


def test_other_prompts_share_as_much_as_they_have_in_common(
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


def test_without_tenants_nothing_is_shared(
    make_engine: Maker, long_prompt: tuple[int, ...]
) -> None:
    found = _run(make_engine(), long_prompt, "", "")
    assert [n for _, n in found] == [len(long_prompt)] * 2


def test_who_has_no_group_shares_nothing(make_engine: Maker, long_prompt: tuple[int, ...]) -> None:
    found = _run(shared_engine(make_engine, {"a": "a"}), long_prompt, "x", "x")
    assert [n for _, n in found] == [len(long_prompt)] * 2


def test_tenants_that_come_to_share_do_not_find_what_was_before(
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


def test_a_full_cache_gives_up_what_is_only_kept(make_engine: Maker, codec: ModelTokenizer) -> None:
    engine = make_engine(max_num_seqs=2, max_num_batched_tokens=64, kv_cache_bytes=700_000)
    engine.set_tenants({"a": Share()}, {"a": "a"})
    prompts = [tuple(codec.encode(f"{word} " * 60)[:200]) for word in ("fox", "dog", "the", "lazy")]

    async def run() -> None:
        async with engine, asyncio.timeout(DEADLINE_S):
            for prompt in prompts * 4:
                assert (await _generate(engine, prompt, "a"))[0]

    asyncio.run(run())


def test_no_two_groups_have_the_same_token(codec: ModelTokenizer) -> None:
    realms = CacheSalts(320)
    realms.set_groups({f"t{i}": f"t{i}" for i in range(64)})
    first: set[Any] = set()
    for i in range(64):
        for token in (0, 1, 318, 319):
            salted = realms.salt_tokens(f"t{i}/1", [token, 7])
            assert salted is not None
            assert salted[1] == 7
            assert 320 <= salted[0] < 1 << 31
            first.add(salted[0])
    assert len(first) == 64 * 4
    assert realms.salt_tokens("unknown/1", [1]) is None


def test_when_numbers_run_out_nothing_is_shared() -> None:
    realms = CacheSalts((1 << 30) - 1)
    realms.set_groups({"a": "a", "b": "b"})
    assert realms.salt_tokens("a/1", [5]) == [5 | 1 << 30]
    assert realms.salt_tokens("b/1", [5]) is None
