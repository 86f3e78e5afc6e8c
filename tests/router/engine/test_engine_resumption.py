"""Resumption after a crash: requests continue to the text they would have had without it."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
from tiny_engine import manager_of, run_here

from faasmoe_router.engine.engine import Engine
from faasmoe_router.engine.fair_queue import Share
from faasmoe_router.engine.generation import (
    Generation,
    GenerationRequest,
    SamplingParams,
    StopConditions,
)
from faasmoe_router.engine.sampler import DrawParams, LogitBias, Penalties
from faasmoe_router.engine.structured_output import GrammarSource
from faasmoe_router.engine.tokenizer import ModelTokenizer
from faasmoe_router.errors import GenerationFailed

DEADLINE_S = 120.0
N_TOKENS = 150
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"type": "string", "pattern": "^[a-z]{20,30}$"}},
        "required": ["name"],
        "additionalProperties": False,
    }
)
Maker = Callable[..., Engine]
Greedy = Callable[[tuple[int, ...], int], list[int]]
Prompt = tuple[int, ...]
Transcript = tuple[str, str | None, list[tuple[int, int, float]]]
CrashInjector = Callable[[Engine], None]


def run(engine: Engine, work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    async def scenario() -> Any:
        async with engine:
            return await asyncio.wait_for(work(), DEADLINE_S)

    return asyncio.run(scenario())


async def text_of(generation: Generation) -> str:
    async with generation:
        return "".join([delta.text async for _, delta in generation])


def crash_between_steps(engine: Engine) -> None:
    processor = manager_of(engine).batch_processor

    def crash() -> None:
        raise MemoryError("no memory")

    processor.prepare_next_batch = crash


def crash_before_delivering_tokens(engine: Engine) -> None:
    """Crash after a step was computed and sampled, before its tokens are delivered."""
    router = manager_of(engine).output_router

    def crash(outputs: list[Any]) -> None:
        raise OSError("the outputs cannot be delivered")

    router.deliver_batch = crash


def crash_every_step(engine: Engine) -> None:
    manager = manager_of(engine)
    inputs = manager.batch_processor.inputs_and_outputs

    def crash(*_: Any) -> None:
        raise RuntimeError("the device is gone")

    inputs.retrieve_device_outputs = crash


async def make_requests(engine: Engine, prompt: Prompt) -> list[GenerationRequest]:
    schema = await engine.grammar_compiler.compile(GrammarSource("json_schema", SCHEMA), run_here)
    seeded = DrawParams(1.0, seed=5)
    asked: list[tuple[SamplingParams, StopConditions]] = [
        (SamplingParams(), StopConditions()),
        (SamplingParams(seeded, n_logprobs=2), StopConditions()),
        (SamplingParams(seeded, Penalties(0.5, 0.3, 1.3), n_logprobs=1), StopConditions()),
        (SamplingParams(seeded, grammar=schema), StopConditions()),
        (SamplingParams(grammar=schema, n_logprobs=0), StopConditions()),
        (
            SamplingParams(seeded, logit_bias=LogitBias(bad_words_token_ids=((50, 60), (70,)))),
            StopConditions(min_tokens=140),
        ),
    ]
    return [GenerationRequest(prompt, N_TOKENS, choosing, ending) for choosing, ending in asked]


async def generate_transcripts(
    engine: Engine, prompt: Prompt, crash: CrashInjector | None, *, at: int
) -> list[Transcript]:
    """Return the outputs of requests with all sampling options; crash after some tokens of each."""
    requests = await make_requests(engine, prompt)
    texts, reasons = [""] * len(requests), [""] * len(requests)
    logprobs: list[list[tuple[int, int, float]]] = [[] for _ in requests]
    n_tokens = [0] * len(requests)
    async with engine.generate(requests) as generation:
        async for i, delta in generation:
            texts[i] += delta.text
            n_tokens[i] += delta.n_tokens
            reasons[i] += delta.finish_reason or ""
            logprobs[i] += [(start, entry.token, entry.logprob) for start, entry in delta.logprobs]
            if crash is not None and min(n_tokens) >= at:
                crash(engine)
                crash = None
    assert crash is None, "the engine was never killed"
    return list(zip(texts, reasons, logprobs, strict=True))


@pytest.mark.parametrize("at", [1, 12])
@pytest.mark.parametrize(
    "kill", [crash_between_steps, crash_before_delivering_tokens, crash_every_step]
)
def test_resumed_request_continues_to_the_same_text(
    make_engine: Maker, prompt_ids: Prompt, kill: CrashInjector, at: int
) -> None:
    whole, broken = make_engine(), make_engine()
    expected = run(whole, lambda: generate_transcripts(whole, prompt_ids, None, at=at))

    async def work() -> list[Transcript]:
        first = broken._batcher
        transcripts = await generate_transcripts(broken, prompt_ids, kill, at=at)
        assert broken._batcher is not first
        return transcripts

    found = run(broken, work)
    for mine, other in zip(found, expected, strict=True):
        assert mine[:2] == other[:2]
        assert [entry[:2] for entry in mine[2]] == [entry[:2] for entry in other[2]]
        assert [entry[2] for entry in mine[2]] == pytest.approx(
            [entry[2] for entry in other[2]], abs=1e-3
        )
    assert len(json.loads(found[3][0])["name"]) >= 20
    resumed = broken.metrics.resumed_requests
    assert resumed._value.get() == len(found)
    # Each prompt counts once, however often it was computed.
    assert broken.metrics.prompt_tokens._value.get() == len(found) * len(prompt_ids)


@pytest.fixture
def unlogged() -> Iterator[None]:
    """Disables logging: pytest keeps records, and with an error the frames it was raised in."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def lingering(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the calls of executor threads alive, as an idle thread does until its next call."""
    to_thread, kept = asyncio.to_thread, []

    async def to_lingering_thread(call: Callable[..., Any], *args: Any) -> Any:
        kept.append((call, args))
        return await to_thread(call, *args)

    monkeypatch.setattr(asyncio, "to_thread", to_lingering_thread)


@pytest.mark.usefixtures("unlogged", "lingering")
def test_crashed_batchers_cache_is_freed_before_the_next_starts(
    make_engine: Maker, prompt_ids: Prompt
) -> None:
    engine = make_engine()

    async def work() -> None:
        generation = engine.generate([GenerationRequest(prompt_ids, 240)])
        await anext(aiter(generation))
        first = engine._batcher.epoch  # type: ignore[union-attr]
        cache = weakref.ref(manager_of(engine).batch_processor.cache)
        crash_between_steps(engine)
        while engine._batcher is None or engine._batcher.epoch is first:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert cache() is None
        assert engine.is_busy

    run(engine, work)


def test_request_preempted_before_a_crash_is_resumed_in_turn(
    make_engine: Maker, model_tokenizer: ModelTokenizer, greedy: Greedy, prompt_ids: Prompt
) -> None:
    engine = make_engine(max_num_seqs=2)
    engine.set_tenants({"flood": Share(), "quiet": Share()}, {})

    async def work() -> None:
        request = GenerationRequest(prompt_ids, 120)
        floods = [engine.generate([request], tenant="flood") for _ in range(2)]
        for generation in floods:
            await anext(aiter(generation))
        quiet = engine.generate([request], tenant="quiet")
        assert engine.sequence_counts("flood") == (1, 1)
        crash_between_steps(engine)
        expected = model_tokenizer.decode(greedy(prompt_ids, 120))
        assert await text_of(quiet) == expected
        # Their first token was read above.
        assert all([expected.endswith(await text_of(flood)) for flood in floods])

    run(engine, work)


def test_request_fails_after_two_crashes_but_not_after_one(
    make_engine: Maker, model_tokenizer: ModelTokenizer, greedy: Greedy, prompt_ids: Prompt
) -> None:
    engine = make_engine()

    async def work() -> None:
        both = engine.generate([GenerationRequest(prompt_ids, 240)])
        both_deltas = aiter(both)
        await anext(both_deltas)
        first = engine._batcher
        crash_between_steps(engine)
        while engine._batcher is first or not engine.is_ready:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        second = engine.generate([GenerationRequest(prompt_ids, 240)])
        await anext(aiter(second))
        crash_between_steps(engine)
        with pytest.raises(GenerationFailed, match="crashed again"):
            async for _ in both_deltas:
                pass
        assert model_tokenizer.decode(greedy(prompt_ids, 240)).endswith(await text_of(second))

    run(engine, work)


def test_stop_during_a_restart_ends_the_thread(
    make_engine: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(threading.enumerate())
    engine = make_engine()
    make, is_making, go = engine._make_batcher, threading.Event(), threading.Event()

    def make_late(loop: asyncio.AbstractEventLoop) -> Any:
        is_making.set()
        go.wait(DEADLINE_S)
        return make(loop)

    async def scenario() -> None:
        async with engine:
            crash_between_steps(engine)
            monkeypatch.setattr(engine, "_make_batcher", make_late)
            while not is_making.is_set():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            asyncio.get_running_loop().call_later(0.1, go.set)  # while the engine is being stopped

    asyncio.run(scenario())
    left = set(threading.enumerate()) - before
    assert not [thread for thread in left if thread.is_alive() and not thread.daemon]


def test_request_cancelled_while_no_batcher_runs_is_removed(
    make_engine: Maker, prompt_ids: Prompt
) -> None:
    engine = make_engine()

    async def work() -> None:
        async with engine.generate([GenerationRequest(prompt_ids, 240)]) as generation:
            await anext(aiter(generation))
            crash_between_steps(engine)
            while engine.is_ready:  # noqa: ASYNC110
                await asyncio.sleep(0.002)
        assert not engine.is_busy
        while not engine.is_ready:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert len(await text_of(engine.generate([GenerationRequest(prompt_ids, 5)]))) > 0
        assert engine.request_counts() == (0, 0)

    run(engine, work)
