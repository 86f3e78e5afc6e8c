"""Isolation of errors: requests that are not the cause of one get the text they would have had."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest
from tiny_engine import manager_of, run_here
from torch import Tensor

from faasmoe_router.engine.batch_sampler import BatchSampler
from faasmoe_router.engine.engine import Engine
from faasmoe_router.engine.generation import Generation, GenerationRequest, SamplingParams
from faasmoe_router.engine.sampler import DrawParams
from faasmoe_router.engine.structured_output import GrammarSource
from faasmoe_router.engine.tokenizer import ModelTokenizer
from faasmoe_router.errors import GenerationFailed, StoreCorrupted
from faasmoe_transformers.error_isolation import MAX_ISOLATED_FAILURES

DEADLINE_S = 120.0
Maker = Callable[..., Engine]
Greedy = Callable[[tuple[int, ...], int], list[int]]


def run(engine: Engine, work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    async def scenario() -> Any:
        async with engine:
            return await asyncio.wait_for(work(), DEADLINE_S)

    return asyncio.run(scenario())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.01)


async def text_of(generation: Generation) -> str:
    async with generation:
        return "".join([delta.text async for _, delta in generation])


def make_steps_raise(
    model: Any, mark: int, *, times: int = 10**9, error: Exception | None = None
) -> list[int]:
    """Make every step with three `mark` tokens in a row raise; return the sizes of those steps."""
    forward = model.forward
    sizes: list[int] = []

    def raise_on_mark(*, input_ids: Tensor, **given: Any) -> Any:
        hit = input_ids[0] == mark  # [T]
        if bool((hit[:-2] & hit[1:-1] & hit[2:]).any()) and len(sizes) < times:
            sizes.append(input_ids.shape[-1])
            raise error or RuntimeError("this prompt raises")
        return forward(input_ids=input_ids, **given)

    model.forward = raise_on_mark
    return sizes


@pytest.fixture
def mark(model_tokenizer: ModelTokenizer) -> int:
    return model_tokenizer.encode("~")[0]


def prompts(model_tokenizer: ModelTokenizer) -> list[tuple[int, ...]]:
    texts = ("a", "lazy dog " * 5, "the quick", "fox jumps over", "the", "brown fox", "over")
    return [tuple(model_tokenizer.encode(text)) for text in texts]


@pytest.mark.parametrize("place", [0, 3, 7])
def test_prompt_that_raises_fails_alone(
    make_engine: Maker,
    model: Any,
    model_tokenizer: ModelTokenizer,
    greedy: Greedy,
    mark: int,
    place: int,
) -> None:
    good = prompts(model_tokenizer)
    expected = [model_tokenizer.decode(greedy(prompt, 20)) for prompt in good]
    engine = make_engine()
    sizes = make_steps_raise(model, mark)

    async def work() -> None:
        generations = [engine.generate([GenerationRequest(p, 20)]) for p in good[:place]]
        bad = engine.generate([GenerationRequest((*good[1], *[mark] * 3), 20)])
        generations += [engine.generate([GenerationRequest(p, 20)]) for p in good[place:]]
        with pytest.raises(GenerationFailed):
            await text_of(bad)
        assert [await text_of(g) for g in generations] == expected
        assert engine.is_ready

    run(engine, work)
    assert len(sizes) >= 1


def test_raising_request_does_not_change_running_texts(
    make_engine: Maker, model: Any, model_tokenizer: ModelTokenizer, greedy: Greedy, mark: int
) -> None:
    good = prompts(model_tokenizer)
    sampled = SamplingParams(DrawParams(1.0, seed=5))
    engine = make_engine()

    async def work() -> None:
        alone = await text_of(engine.generate([GenerationRequest(good[2], 60, sampled)]))
        make_steps_raise(model, mark)
        running = [engine.generate([GenerationRequest(p, 60)]) for p in good]
        running.append(engine.generate([GenerationRequest(good[2], 60, sampled)]))
        await anext(aiter(running[0]))
        for _ in range(5):
            with pytest.raises(GenerationFailed):
                await text_of(engine.generate([GenerationRequest((mark,) * 3, 5)]))
        texts = [await text_of(generation) for generation in running[1:]]
        assert texts == [*[model_tokenizer.decode(greedy(p, 60)) for p in good[1:]], alone]

    run(engine, work)


def test_chunked_prefill_is_restored_after_a_failed_step(
    make_engine: Maker, model: Any, model_tokenizer: ModelTokenizer, greedy: Greedy, mark: int
) -> None:
    long = tuple(model_tokenizer.encode("jumps over the lazy dog " * 6))
    engine = make_engine(max_num_seqs=4, max_num_batched_tokens=16)
    make_steps_raise(model, mark)

    async def work() -> None:
        wanted = engine.generate([GenerationRequest(long, 10)])
        bad = [engine.generate([GenerationRequest((mark,) * 3, 5)]) for _ in range(2)]
        for generation in bad:
            with pytest.raises(GenerationFailed):
                await text_of(generation)
        assert await text_of(wanted) == model_tokenizer.decode(greedy(long, 10))

    run(engine, work)


def test_transient_error_fails_no_request_of_a_batch(
    make_engine: Maker, model: Any, model_tokenizer: ModelTokenizer, greedy: Greedy, mark: int
) -> None:
    good = [(*prompt, mark, mark, mark) for prompt in prompts(model_tokenizer)[:4]]
    expected = [model_tokenizer.decode(greedy(prompt, 12)) for prompt in good]
    engine = make_engine()
    make_steps_raise(model, mark, times=1)

    async def work() -> list[str]:
        generation = engine.generate([GenerationRequest(prompt, 12) for prompt in good])
        texts = [""] * 4
        async with generation:
            async for index, delta in generation:
                texts[index] += delta.text
        return texts

    assert run(engine, work) == expected


def test_error_of_the_sampler_fails_only_the_request_that_causes_it(
    make_engine: Maker,
    model_tokenizer: ModelTokenizer,
    greedy: Greedy,
    prompt_ids: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan_batch = BatchSampler.plan_batch

    def reject_states(self: BatchSampler, request_ids: list[str], rows: Sequence[Any]) -> None:
        if rows:
            raise ValueError("an invalid parameter that was not rejected before")
        plan_batch(self, request_ids, rows)

    monkeypatch.setattr(BatchSampler, "plan_batch", reject_states)
    seeded = SamplingParams(DrawParams(1.0, seed=13))
    engine = make_engine()

    async def work() -> None:
        good = engine.generate([GenerationRequest(prompt_ids, 20)])
        bad = engine.generate([GenerationRequest(prompt_ids, 20, seeded)])
        with pytest.raises(GenerationFailed):
            await text_of(bad)
        assert await text_of(good) == model_tokenizer.decode(greedy(prompt_ids, 20))

    run(engine, work)


def test_transient_error_does_not_fail_a_request_that_runs_alone(
    make_engine: Maker, model: Any, model_tokenizer: ModelTokenizer, greedy: Greedy, mark: int
) -> None:
    prompt = (*prompts(model_tokenizer)[1], mark, mark, mark)
    engine = make_engine()
    make_steps_raise(model, mark, times=1)

    async def work() -> None:
        text = await text_of(engine.generate([GenerationRequest(prompt, 12)]))
        assert text == model_tokenizer.decode(greedy(prompt, 12))

    run(engine, work)


def test_step_that_fails_after_sampling_records_each_token_once(
    make_engine: Maker, model_tokenizer: ModelTokenizer
) -> None:
    """The sampling state follows the tokens that a request has, not those of failed steps."""
    engine = make_engine()

    async def sampled_tokens(*, raising_after: int) -> list[list[tuple[int, int]]]:
        inputs = manager_of(engine).batch_processor.inputs_and_outputs
        retrieve, n_steps = inputs.retrieve_device_outputs, 0

        def raise_periodically() -> None:
            nonlocal n_steps
            n_steps += 1
            if raising_after and n_steps % raising_after == 0:
                raise RuntimeError("the outputs did not arrive")
            retrieve()

        inputs.retrieve_device_outputs = raise_periodically
        grammar = await engine.grammar_compiler.compile(
            GrammarSource("regex", "([a-z]{2} ){20}"), run_here
        )
        held = SamplingParams(DrawParams(1.0, seed=5), n_logprobs=1, grammar=grammar)
        requests = [GenerationRequest(prompt, 60, held) for prompt in prompts(model_tokenizer)[:3]]
        found: list[list[tuple[int, int]]] = [[] for _ in requests]
        async with engine.generate(requests) as generation:
            async for index, delta in generation:
                found[index] += [(at, entry.token) for at, entry in delta.logprobs]
        inputs.retrieve_device_outputs = retrieve
        return found

    async def work() -> None:
        undisturbed = await sampled_tokens(raising_after=0)
        assert await sampled_tokens(raising_after=4) == undisturbed
        assert all(len(tokens) >= 20 for tokens in undisturbed)

    run(engine, work)


def test_error_of_every_request_restarts_the_batcher_which_resumes_them(
    make_engine: Maker, model: Any, model_tokenizer: ModelTokenizer, greedy: Greedy
) -> None:
    good = prompts(model_tokenizer)
    engine = make_engine()
    forward, dying = model.forward, list[Any]()

    def broken(**given: Any) -> Any:
        if engine._batcher is dying[0]:
            dying.append(None)
            raise RuntimeError("the device is gone")
        return forward(**given)

    async def work() -> None:
        dying.append(engine._batcher)
        model.forward = broken
        generations = [engine.generate([GenerationRequest(p, 20)]) for p in good]
        texts = [await text_of(generation) for generation in generations]
        assert texts == [model_tokenizer.decode(greedy(p, 20)) for p in good]
        assert engine._batcher is not dying[0]

    run(engine, work)
    assert len(dying) > MAX_ISOLATED_FAILURES


def test_requests_that_crash_every_batcher_fail_and_the_engine_recovers(
    make_engine: Maker, model: Any, model_tokenizer: ModelTokenizer, greedy: Greedy, mark: int
) -> None:
    engine = make_engine()
    sizes = make_steps_raise(model, mark)

    async def work() -> None:
        bad = [engine.generate([GenerationRequest((mark, mark, mark, n), 5)]) for n in range(8)]
        for generation in bad:
            with pytest.raises(GenerationFailed):
                await text_of(generation)
        await until(lambda: engine.is_ready)
        prompt = prompts(model_tokenizer)[2]
        text = await text_of(engine.generate([GenerationRequest(prompt, 5)]))
        assert text == model_tokenizer.decode(greedy(prompt, 5))

    run(engine, work)
    assert sizes.count(4) >= 2 * MAX_ISOLATED_FAILURES


def test_corrupted_store_fails_its_requests_without_a_restart(
    make_engine: Maker, model: Any, model_tokenizer: ModelTokenizer, mark: int
) -> None:
    engine = make_engine()
    make_steps_raise(model, mark, error=StoreCorrupted("wrong bytes"))

    async def work() -> None:
        first = engine._batcher
        bad = [engine.generate([GenerationRequest((mark, mark, mark, n), 5)]) for n in range(5)]
        for generation in bad:
            with pytest.raises(GenerationFailed):
                await text_of(generation)
        assert len(await text_of(engine.generate([GenerationRequest((mark,), 5)]))) > 0
        assert engine._batcher is first

    run(engine, work)
