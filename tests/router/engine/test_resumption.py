"""An engine that dies: what it computed goes on with the next one as if nothing had been."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from faasmoe_router.engine.bias import Bias
from faasmoe_router.engine.choosing import Choosing
from faasmoe_router.engine.ending import Ending
from faasmoe_router.engine.engine import Engine
from faasmoe_router.engine.generation import Generation, GenerationRequest
from faasmoe_router.engine.grammar import GrammarSource
from faasmoe_router.engine.penalties import Penalties
from faasmoe_router.engine.sampling import SamplingParams
from faasmoe_router.engine.text import TextCodec
from faasmoe_router.errors import GenerationFailed
from faasmoe_router.tenants.fairness import Share

DEADLINE_S = 60.0
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
Told = tuple[str, str | None, list[tuple[int, int, float]]]
Killer = Callable[[Engine], None]


def run(engine: Engine, work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    async def inside() -> Any:
        async with engine:
            return await asyncio.wait_for(work(), DEADLINE_S)

    return asyncio.run(inside())


async def text_of(generation: Generation) -> str:
    async with generation:
        return "".join([delta.text async for _, delta in generation])


def fail_between_steps(engine: Engine) -> None:
    processor = engine._batcher._manager.batch_processor  # type: ignore[union-attr]

    def die() -> None:
        raise MemoryError("no memory")

    processor.prepare_next_batch = die


def fail_with_tokens_that_are_never_told(engine: Engine) -> None:
    """The step was computed, its tokens are chosen and counted; then nobody hears of them."""
    router = engine._batcher._manager.output_router  # type: ignore[union-attr]

    def die(outputs: list[Any]) -> None:
        raise OSError("the outputs cannot be delivered")

    router.deliver_batch = die


def fail_every_step(engine: Engine) -> None:
    manager = engine._batcher._manager  # type: ignore[union-attr]
    inputs = manager.batch_processor.inputs_and_outputs

    def die(*_: Any) -> None:
        raise RuntimeError("the device is gone")

    inputs.retrieve_device_outputs = die


async def requests_of(engine: Engine, prompt: Prompt) -> list[GenerationRequest]:
    schema = await engine.grammars.compile(GrammarSource("json_schema", SCHEMA))
    seeded = SamplingParams(1.0, seed=5)
    asked: list[tuple[Choosing, Ending]] = [
        (Choosing(), Ending()),
        (Choosing(seeded, n_logprobs=2), Ending()),
        (Choosing(seeded, Penalties(0.5, 0.3, 1.3), n_logprobs=1), Ending()),
        (Choosing(seeded, grammar=schema), Ending()),
        (Choosing(grammar=schema, n_logprobs=0), Ending()),
        (Choosing(seeded, bias=Bias(bad_words=((50, 60), (70,)))), Ending(min_tokens=140)),
    ]
    return [GenerationRequest(prompt, N_TOKENS, choosing, ending) for choosing, ending in asked]


async def tell(engine: Engine, prompt: Prompt, kill: Killer | None, *, at: int) -> list[Told]:
    """Return what becomes of all sorts of requests; kill the engine after some tokens of each."""
    requests = await requests_of(engine, prompt)
    texts, reasons = [""] * len(requests), [""] * len(requests)
    logprobs: list[list[tuple[int, int, float]]] = [[] for _ in requests]
    n_tokens = [0] * len(requests)
    async with engine.generate(requests) as generation:
        async for i, delta in generation:
            texts[i] += delta.text
            n_tokens[i] += delta.n_tokens
            reasons[i] += delta.finish_reason or ""
            logprobs[i] += [(start, entry.token, entry.logprob) for start, entry in delta.logprobs]
            if kill is not None and min(n_tokens) >= at:
                kill(engine)
                kill = None
    assert kill is None, "the engine was never killed"
    return list(zip(texts, reasons, logprobs, strict=True))


@pytest.mark.parametrize("at", [1, 12])
@pytest.mark.parametrize(
    "kill", [fail_between_steps, fail_with_tokens_that_are_never_told, fail_every_step]
)
def test_every_way_of_choosing_tokens_goes_on_to_the_same_text(
    make_engine: Maker, prompt_ids: Prompt, kill: Killer, at: int
) -> None:
    whole, broken = make_engine(), make_engine()
    expected = run(whole, lambda: tell(whole, prompt_ids, None, at=at))

    async def work() -> list[Told]:
        first = broken._batcher
        told = await tell(broken, prompt_ids, kill, at=at)
        assert broken._batcher is not first
        return told

    found = run(broken, work)
    for mine, other in zip(found, expected, strict=True):
        assert mine[:2] == other[:2]
        assert [entry[:2] for entry in mine[2]] == [entry[:2] for entry in other[2]]
        assert [entry[2] for entry in mine[2]] == pytest.approx(
            [entry[2] for entry in other[2]], abs=1e-3
        )
    assert len(json.loads(found[3][0])["name"]) >= 20
    resumed = broken.metrics.resumed
    assert resumed._value.get() == len(found)
    # Each prompt was asked for once, however often it was computed.
    assert broken.metrics.prompt_tokens._value.get() == len(found) * len(prompt_ids)


@pytest.fixture
def unlogged() -> Iterator[None]:
    """Nothing is logged: pytest keeps records, and with an error the frames it was raised in."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def lingering(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool's threads keep the calls that they have made, as they do until they run again."""
    to_thread, kept = asyncio.to_thread, []

    async def to_lingering_thread(call: Callable[..., Any], *args: Any) -> Any:
        kept.append((call, args))
        return await to_thread(call, *args)

    monkeypatch.setattr(asyncio, "to_thread", to_lingering_thread)


@pytest.mark.usefixtures("unlogged", "lingering")
def test_the_next_engine_has_the_memory_of_the_one_that_died(
    make_engine: Maker, prompt_ids: Prompt
) -> None:
    engine = make_engine()

    async def work() -> None:
        generation = engine.generate([GenerationRequest(prompt_ids, 240)])
        await anext(aiter(generation))
        first = engine._batcher.life  # type: ignore[union-attr]
        cache = weakref.ref(engine._batcher._manager.batch_processor.cache)  # type: ignore[union-attr]
        fail_between_steps(engine)
        while engine._batcher is None or engine._batcher.life is first:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert cache() is None
        assert engine.busy

    run(engine, work)


def test_what_gave_way_before_the_engine_died_goes_on_in_its_turn(
    make_engine: Maker, codec: TextCodec, greedy: Greedy, prompt_ids: Prompt
) -> None:
    engine = make_engine(max_num_seqs=2)
    engine.set_tenants({"flood": Share(), "quiet": Share()}, {})

    async def work() -> None:
        request = GenerationRequest(prompt_ids, 120)
        floods = [engine.generate([request], tenant="flood") for _ in range(2)]
        for generation in floods:
            await anext(aiter(generation))
        quiet = engine.generate([request], tenant="quiet")
        assert engine.sequences_of("flood") == (1, 1)
        fail_between_steps(engine)
        expected = codec.decode(greedy(prompt_ids, 120))
        assert await text_of(quiet) == expected
        # Of these the first token was read above.
        assert all([expected.endswith(await text_of(flood)) for flood in floods])

    run(engine, work)


def test_a_request_with_which_two_engines_died_fails_and_one_that_saw_the_second_goes_on(
    make_engine: Maker, codec: TextCodec, greedy: Greedy, prompt_ids: Prompt
) -> None:
    engine = make_engine()

    async def work() -> None:
        both = engine.generate([GenerationRequest(prompt_ids, 240)])
        both_deltas = aiter(both)
        await anext(both_deltas)
        first = engine._batcher
        fail_between_steps(engine)
        while engine._batcher is first or not engine.ready:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        second = engine.generate([GenerationRequest(prompt_ids, 240)])
        await anext(aiter(second))
        fail_between_steps(engine)
        with pytest.raises(GenerationFailed, match="died again"):
            async for _ in both_deltas:
                pass
        assert codec.decode(greedy(prompt_ids, 240)).endswith(await text_of(second))

    run(engine, work)


def test_an_engine_that_is_stopped_while_it_starts_again_leaves_no_thread(
    make_engine: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(threading.enumerate())
    engine = make_engine()
    make, is_making, go = engine._make_batcher, threading.Event(), threading.Event()

    def make_late(loop: asyncio.AbstractEventLoop) -> Any:
        is_making.set()
        go.wait(DEADLINE_S)
        return make(loop)

    async def story() -> None:
        async with engine:
            fail_between_steps(engine)
            monkeypatch.setattr(engine, "_make_batcher", make_late)
            while not is_making.is_set():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            asyncio.get_running_loop().call_later(0.1, go.set)  # the engine is being stopped then

    asyncio.run(story())
    left = set(threading.enumerate()) - before
    assert not [thread for thread in left if thread.is_alive() and not thread.daemon]


def test_who_hangs_up_while_no_engine_runs_is_forgotten(
    make_engine: Maker, prompt_ids: Prompt
) -> None:
    engine = make_engine()

    async def work() -> None:
        async with engine.generate([GenerationRequest(prompt_ids, 240)]) as generation:
            await anext(aiter(generation))
            fail_between_steps(engine)
            while engine.ready:  # noqa: ASYNC110
                await asyncio.sleep(0.002)
        assert not engine.busy
        while not engine.ready:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert len(await text_of(engine.generate([GenerationRequest(prompt_ids, 5)]))) > 0
        assert engine._counts() == (0, 0)

    run(engine, work)
