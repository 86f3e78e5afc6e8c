"""Texts that are read as a whole: their tokens are processed some at a time, and none is lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from tiny_engine import manager_of

from faasmoe_router.engine.engine import Engine
from faasmoe_router.engine.generation import (
    CompletionOutput,
    Generation,
    GenerationRequest,
    NullUsageRecorder,
    SamplingParams,
    StopConditions,
)
from faasmoe_router.engine.output_processor import SequenceOutputProcessor
from faasmoe_router.engine.tokenizer import ModelTokenizer
from faasmoe_router.engine.tracked_request import MAX_COLLECTED_TOKENS

DEADLINE_S = 20.0
Maker = Callable[..., Engine]
Greedy = Callable[[tuple[int, ...], int], list[int]]
Prompt = tuple[int, ...]


class CountingRecorder(NullUsageRecorder):
    """Counts the tokens of a request."""

    def __init__(self) -> None:
        self.n_tokens = 0
        self.is_finished = False

    def record_tokens(self, n_tokens: int, *, is_last: bool) -> None:
        assert not self.is_finished
        self.n_tokens += n_tokens

    def finish(self) -> None:
        self.is_finished = True


def run(engine: Engine, work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    async def entered() -> Any:
        async with engine:
            return await asyncio.wait_for(work(), DEADLINE_S)

    return asyncio.run(entered())


async def read(generation: Generation) -> tuple[str, list[int]]:
    """Return the text, and the tokens of each output."""
    text, counts = "", []
    async with generation:
        async for _, delta in generation:
            text += delta.text
            counts.append(delta.n_tokens)
    return text, counts


def test_tokens_after_the_first_are_put_out_some_at_a_time(
    make_engine: Maker, model_tokenizer: ModelTokenizer, greedy: Greedy, prompt_ids: Prompt
) -> None:
    engine, n_tokens = make_engine(), 2 + 3 * MAX_COLLECTED_TOKENS

    async def work() -> None:
        request = GenerationRequest(prompt_ids, n_tokens)
        text, counts = await read(engine.generate([request], is_streamed=False))
        assert text == model_tokenizer.decode(greedy(prompt_ids, n_tokens))
        assert counts == [1, *[MAX_COLLECTED_TOKENS] * 3, 1]
        text, counts = await read(engine.generate([request]))
        assert text == model_tokenizer.decode(greedy(prompt_ids, n_tokens))
        assert counts == [1] * n_tokens

    run(engine, work)


@pytest.mark.parametrize("n_preemptions", [0, 1])
def test_text_that_ends_early_or_is_preempted_is_whole(
    make_engine: Maker,
    model_tokenizer: ModelTokenizer,
    greedy: Greedy,
    prompt_ids: Prompt,
    n_preemptions: int,
) -> None:
    engine = make_engine()
    tokens = greedy(prompt_ids, 60)
    end = next(token for token in tokens[20:] if token not in tokens[:20])
    expected = model_tokenizer.decode(tokens[: tokens.index(end)])

    async def work() -> None:
        request = GenerationRequest(
            prompt_ids, 60, stop_conditions=StopConditions(stop_token_ids=(end,))
        )
        generation = engine.generate([request], is_streamed=False)
        if n_preemptions:
            batcher = engine._batcher
            assert batcher is not None
            (sequence_id,) = engine._tracker._tracked
            batcher.preempt_request(sequence_id)
            batcher.resume_request(sequence_id)
        assert (await read(generation))[0] == expected

    run(engine, work)


def test_request_that_is_left_has_used_what_was_computed(
    make_engine: Maker, prompt_ids: Prompt
) -> None:
    engine, recorder, n_batches = make_engine(), CountingRecorder(), 0

    def count(batch: object) -> None:
        nonlocal n_batches
        n_batches += 1

    async def work() -> None:
        manager_of(engine).batch_processor.scheduler.count_batch = count
        generation = engine.generate(
            [GenerationRequest(prompt_ids, 200)], usage_recorder=recorder, is_streamed=False
        )
        end_s = time.monotonic() + DEADLINE_S
        while n_batches < 10:
            assert time.monotonic() < end_s
            await asyncio.sleep(0.001)
        n_computed = n_batches - 1  # whose outputs were handed to the event loop before
        await asyncio.sleep(0)
        generation.cancel()
        assert recorder.n_tokens >= n_computed
        assert recorder.is_finished
        assert engine.metrics.generation_tokens._value.get() == recorder.n_tokens

    run(engine, work)


def test_sequences_end_though_what_was_computed_of_one_cannot_be_processed(
    make_engine: Maker, prompt_ids: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, n_batches = make_engine(), 0
    process = SequenceOutputProcessor.process_tokens

    def process_first_only(self: SequenceOutputProcessor, tokens: list[int]) -> CompletionOutput:
        if self.n_tokens:
            raise ValueError("a test")
        return process(self, tokens)

    def count(batch: object) -> None:
        nonlocal n_batches
        n_batches += 1

    async def work() -> None:
        monkeypatch.setattr(SequenceOutputProcessor, "process_tokens", process_first_only)
        manager_of(engine).batch_processor.scheduler.count_batch = count
        generation = engine.generate([GenerationRequest(prompt_ids, 200)] * 2, is_streamed=False)
        end_s = time.monotonic() + DEADLINE_S
        while n_batches < 6:
            assert time.monotonic() < end_s
            await asyncio.sleep(0.001)
        generation.cancel()
        assert engine.sequence_counts("") == (0, 0)
        assert not engine.is_busy

    run(engine, work)


@pytest.mark.parametrize(
    ("request_", "is_collected"),
    [
        (GenerationRequest((1,), 5), True),
        (GenerationRequest((1,), 5, stop_conditions=StopConditions(stop_token_ids=(3,))), True),
        (GenerationRequest((1,), 5, stop_conditions=StopConditions(("a",))), False),
        (GenerationRequest((1,), 5, SamplingParams(n_logprobs=0)), False),
        (GenerationRequest((1,), 5, scores_prompt=True), False),
    ],
)
def test_what_must_be_seen_by_token_is_not_collected(
    request_: GenerationRequest, is_collected: bool
) -> None:
    assert request_.ends_by_token is is_collected
