"""Fair queueing in the engine: sequences wait by tenant, are preempted and resumed."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest
from tiny_engine import manager_of

from faasmoe_router.engine.batcher import request_tenant
from faasmoe_router.engine.engine import Engine
from faasmoe_router.engine.fair_queue import Share
from faasmoe_router.engine.generation import Generation, GenerationRequest, SamplingParams
from faasmoe_router.engine.sampler import DrawParams, Penalties
from faasmoe_router.engine.tokenizer import ModelTokenizer
from faasmoe_router.errors import TenantQueueFull
from faasmoe_transformers.scheduler import ComputedTokens

DEADLINE_S = 120.0
Maker = Callable[..., Engine]
Greedy = Callable[[tuple[int, ...], int], list[int]]
Prompt = tuple[int, ...]


def _run(engine: Engine, work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    async def run() -> Any:
        async with engine:
            return await asyncio.wait_for(work(), DEADLINE_S)

    return asyncio.run(run())


async def _until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end_s, "the condition did not come true in time"
        await asyncio.sleep(0.002)


async def _text(generation: Generation) -> str:
    async with generation:
        return "".join([delta.text async for _, delta in generation])


def test_batcher_holds_at_most_max_num_seqs_requests(
    make_engine: Maker, prompt_ids: Prompt
) -> None:
    engine = make_engine(max_num_seqs=2)

    async def work() -> None:
        generation = engine.generate([GenerationRequest(prompt_ids, 200)] * 5)
        assert engine.sequence_counts("") == (2, 3)
        assert engine._batcher is not None
        await _until(
            lambda: engine._batcher is not None and engine._batcher.request_counts() == (2, 0)
        )
        assert engine.request_counts() == (2, 3)
        generation.cancel()
        assert engine.sequence_counts("") == (0, 0)
        assert not engine.is_busy

    _run(engine, work)


@pytest.mark.parametrize(
    "choosing",
    [
        pytest.param(SamplingParams(), id="greedy"),
        pytest.param(SamplingParams(DrawParams(1.0, seed=5)), id="sampled"),
        pytest.param(
            SamplingParams(DrawParams(1.0, seed=5), Penalties(1.0, 0.5, 1.3), n_logprobs=2),
            id="penalized",
        ),
    ],
)
def test_preempted_request_continues_to_the_same_text(
    make_engine: Maker,
    model_tokenizer: ModelTokenizer,
    greedy: Greedy,
    prompt_ids: Prompt,
    choosing: SamplingParams,
) -> None:
    long = GenerationRequest(prompt_ids, 120, choosing)
    short = GenerationRequest(prompt_ids[:2], 10)

    async def alone(engine: Engine) -> str:
        return await _text(engine.generate([long]))

    reference = make_engine()
    expected = _run(reference, lambda: alone(reference))
    if choosing == SamplingParams():
        assert expected == model_tokenizer.decode(greedy(prompt_ids, 120))
    engine = make_engine(max_num_seqs=2)
    shares = {"flood": Share(), "quiet": Share(weight=4)}
    engine.set_tenants(shares, {"flood": "f", "quiet": "q"})

    async def work() -> None:
        floods = [
            asyncio.create_task(_text(engine.generate([long], tenant="flood"))) for _ in range(3)
        ]
        await _until(lambda: engine.sequence_counts("flood") == (2, 1))
        for _ in range(4):
            generation = engine.generate([short], tenant="quiet")
            assert engine.sequence_counts("quiet") == (1, 0)  # at once
            assert engine.sequence_counts("flood")[0] == 1
            assert await _text(generation) == model_tokenizer.decode(
                greedy(short.prompt_token_ids, 10)
            )
        assert await asyncio.gather(*floods) == [expected] * 3

    _run(engine, work)
    metrics = engine.metrics
    [family] = metrics._request_preemptions.collect()
    samples = {sample.name: sample.value for sample in family.samples}
    assert samples["vllm:request_num_preemptions_count"] == 7  # requests
    assert samples["vllm:request_num_preemptions_sum"] == metrics.preemptions._value.get() > 0


def test_preempted_request_can_be_cancelled(make_engine: Maker, prompt_ids: Prompt) -> None:
    engine = make_engine(max_num_seqs=2)
    engine.set_tenants({"flood": Share(), "quiet": Share()}, {})

    async def work() -> None:
        request = GenerationRequest(prompt_ids, 240)
        flood = engine.generate([request, request], tenant="flood")
        quiet = engine.generate([request], tenant="quiet")
        assert engine.sequence_counts("flood") == (1, 1)
        flood.cancel()
        assert engine.sequence_counts("flood") == (0, 0)
        assert len(await _text(quiet)) > 0
        await _until(
            lambda: engine._batcher is not None and engine._batcher.request_counts() == (0, 0)
        )
        assert engine._batcher is not None
        assert not manager_of(engine).batch_processor.scheduler._preempted

    _run(engine, work)


def test_running_and_waiting_requests_survive_a_crash(
    make_engine: Maker,
    model_tokenizer: ModelTokenizer,
    greedy: Greedy,
    prompt_ids: Prompt,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = make_engine(max_num_seqs=1)

    async def work() -> None:
        running = engine.generate([GenerationRequest(prompt_ids, 200)])
        waiting = engine.generate([GenerationRequest(prompt_ids, 5)])
        processor = manager_of(engine).batch_processor

        def die() -> None:
            raise MemoryError("no memory")

        monkeypatch.setattr(processor, "prepare_next_batch", die)
        assert await _text(running) == model_tokenizer.decode(greedy(prompt_ids, 200))
        assert await _text(waiting) == model_tokenizer.decode(greedy(prompt_ids, 5))

    _run(engine, work)


def test_full_tenant_queue_rejects_only_that_tenant(make_engine: Maker, prompt_ids: Prompt) -> None:
    engine = make_engine(max_num_seqs=1, max_waiting=4)
    engine.set_tenants({"a": Share(), "b": Share()}, {})

    async def work() -> None:
        request = GenerationRequest(prompt_ids, 200)
        held = [engine.generate([request], tenant="a") for _ in range(3)]
        with pytest.raises(TenantQueueFull):
            engine.generate([request], tenant="a")
        held.append(engine.generate([request] * 2, tenant="b"))
        assert engine.sequence_counts("b") == (0, 2)
        for generation in held:
            generation.cancel()

    _run(engine, work)
    assert engine.metrics.admission_rejections._value.get() == 1


def test_computed_tokens_are_counted_per_tenant(make_engine: Maker, prompt_ids: Prompt) -> None:
    engine = make_engine()
    engine.set_tenants({"a": Share(), "b": Share()}, {})

    async def work() -> None:
        for tenant, n_tokens in (("a", 7), ("b", 3)):
            await _text(engine.generate([GenerationRequest(prompt_ids, n_tokens)], tenant=tenant))
        # The last token of each is sampled and never computed.
        n_prompt = len(prompt_ids)
        assert engine.computed_tokens.drain() == {"a": n_prompt + 6, "b": n_prompt + 2}
        assert engine.computed_tokens.drain() == {}

    _run(engine, work)


def test_long_prompts_of_one_tenant_do_not_delay_a_short_one_of_another(
    make_engine: Maker,
    model_tokenizer: ModelTokenizer,
    greedy: Greedy,
    prompt_ids: Prompt,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    n_batched, n_long = 64, 240
    engine = make_engine(max_num_seqs=4, max_num_batched_tokens=n_batched)
    engine.set_tenants(dict.fromkeys(("flood", "quiet"), Share()), {})
    long = GenerationRequest((prompt_ids * n_long)[:n_long], 1)
    short = GenerationRequest(prompt_ids[:2], 2)
    batches: list[Counter[str]] = []
    are_all_there = threading.Event()

    def count(batch: Sequence[ComputedTokens]) -> None:
        batches.append(Counter())
        for computed in batch:
            batches[-1][request_tenant(computed.request_id)] += computed.n_tokens

    async def work() -> None:
        processor = manager_of(engine).batch_processor
        processor.scheduler.count_batch = count
        prepare = processor.prepare_next_batch
        monkeypatch.setattr(
            processor, "prepare_next_batch", lambda: are_all_there.wait(DEADLINE_S) and prepare()
        )
        floods = [engine.generate([long], tenant="flood") for _ in range(3)]
        quiet = engine.generate([short], tenant="quiet")
        are_all_there.set()
        assert await _text(quiet) == model_tokenizer.decode(greedy(short.prompt_token_ids, 2))
        for flood in floods:
            await _text(flood)

    _run(engine, work)
    computed = [batch for batch in batches if batch]
    assert [batch["quiet"] for batch in computed[:3]] == [2, 1, 0]
    assert [batch["flood"] for batch in computed[:3]] == [32, 32, n_batched]
    assert sum(batch["flood"] for batch in computed) == 3 * n_long
