import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import torch
from torch import Tensor

from faasmoe_router.engine import supervisor as keeper_module
from faasmoe_router.engine.engine import Engine
from faasmoe_router.engine.generation import (
    Generation,
    GenerationRequest,
    SamplingParams,
    StopConditions,
)
from faasmoe_router.engine.sampler import DrawParams, LogitBias, Penalties
from faasmoe_router.engine.structured_output import GrammarSource
from faasmoe_router.engine.tokenizer import ModelTokenizer
from faasmoe_router.errors import (
    EngineQueueFull,
    EngineUnavailable,
    GenerationFailed,
    NoTokenAllowed,
    RouterConfigError,
    StoreUnreadable,
)
from faasmoe_router.transformers_backend import idle_reclaim as memory_module
from faasmoe_router.transformers_backend.error_isolation import MAX_ISOLATED_FAILURES

DEADLINE_S = 20.0
GREEDY = DrawParams()
Maker = Callable[..., Engine]
Greedy = Callable[[tuple[int, ...], int], list[int]]
Prompt = tuple[int, ...]
Logprobs = list[tuple[int, int, float]]


async def _texts(generation: Generation, n: int = 1) -> list[str]:
    texts = [""] * n
    async with generation:
        async for index, delta in generation:
            texts[index] += delta.text
    return texts


async def _until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end_s, "the condition did not come true in time"
        await asyncio.sleep(0.01)


async def _generate_until_crash(engine: Engine, prompt: Prompt) -> Generation:
    """A request that fails alone ends nothing else; some in a row are not the requests' fault.

    Returns the one with which the engine died.
    """
    for _ in range(MAX_ISOLATED_FAILURES - 1):
        with pytest.raises(GenerationFailed):
            await _texts(engine.generate([GenerationRequest(prompt, 5)]))
    last = engine.generate([GenerationRequest(prompt, 5)])
    await _until(lambda: not engine.is_ready)
    return last


def _run(engine: Engine, work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    async def run() -> Any:
        async with engine:
            return await asyncio.wait_for(work(), DEADLINE_S)

    return asyncio.run(run())


def test_what_others_keep_for_requests_is_given_back_once_there_are_none(
    make_engine: Maker, prompt_ids: Prompt
) -> None:
    engine, given = make_engine(), []
    engine._on_idle = lambda: given.append(engine.is_busy)

    async def work() -> None:
        await _texts(engine.generate([GenerationRequest(prompt_ids, 5)]))
        await _until(lambda: bool(given))

    _run(engine, work)
    assert given == [False]


def _sampled(prompt: Prompt, seed: int, **params: Any) -> GenerationRequest:
    return GenerationRequest(prompt, 24, SamplingParams(DrawParams(1.0, seed=seed, **params)))


def test_greedy_equals_generate_for_prompts_in_one_batch(
    make_engine: Maker, codec: ModelTokenizer, greedy: Greedy
) -> None:
    prompts = [tuple(codec.encode(text)) for text in ("a", "lazy dog " * 5, "the quick")]
    expected = [codec.decode(greedy(prompt, 40)) for prompt in prompts]
    engine = make_engine()
    requests = [GenerationRequest(prompt, 40) for prompt in prompts]
    assert _run(engine, lambda: _texts(engine.generate(requests), 3)) == expected


def test_prompts_longer_than_a_batch_are_prefilled_in_parts(
    make_engine: Maker, codec: ModelTokenizer, greedy: Greedy
) -> None:
    prompt = tuple(codec.encode("jumps over the lazy dog " * 6))
    engine = make_engine(max_num_seqs=2, max_num_batched_tokens=8)
    assert len(prompt) > 24
    texts = _run(engine, lambda: _texts(engine.generate([GenerationRequest(prompt, 10)])))
    assert texts == [codec.decode(greedy(prompt, 10))]


def test_eager_attention_equals_generate_too(
    make_engine: Maker, model: Any, codec: ModelTokenizer, greedy: Greedy, prompt_ids: Prompt
) -> None:
    model._supports_sdpa = False
    engine = make_engine()
    texts = _run(engine, lambda: _texts(engine.generate([GenerationRequest(prompt_ids, 12)])))
    assert model.config._attn_implementation == "paged|eager"
    assert texts == [codec.decode(greedy(prompt_ids, 12))]


def test_seeded_text_is_the_same_alone_and_among_others(
    make_engine: Maker, codec: ModelTokenizer, greedy: Greedy, prompt_ids: Prompt
) -> None:
    engine = make_engine()
    mine = _sampled(prompt_ids, 7, top_p=0.95)
    others = [GenerationRequest(prompt_ids, 30), _sampled(prompt_ids, 8), _sampled(prompt_ids, 9)]

    async def work() -> None:
        alone = await _texts(engine.generate([mine]))
        assert await _texts(engine.generate([mine])) == alone
        together = await _texts(engine.generate([others[0], mine, *others[1:]]), 4)
        assert together[1] == alone[0]
        assert together[0] == codec.decode(greedy(prompt_ids, 30))
        assert len(set(together)) == 4

    _run(engine, work)


def test_memory_given_back_while_idle_changes_no_text(
    make_engine: Maker, prompt_ids: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_back: list[Tensor] = []

    def release(tensor: Tensor) -> None:
        given_back.append(tensor)
        memory_release(tensor)

    memory_release = memory_module.release_pages
    monkeypatch.setattr(memory_module, "release_pages", release)
    monkeypatch.setattr("faasmoe_router.transformers_backend.scheduler.IDLE_RECLAIM_DELAY_S", 0.0)
    engine = make_engine()

    async def work() -> None:
        first = await _texts(engine.generate([GenerationRequest(prompt_ids, 12)]))
        await _until(lambda: len(given_back) == 1)
        assert await _texts(engine.generate([GenerationRequest(prompt_ids, 12)])) == first
        await _until(lambda: len(given_back) == 2)

    _run(engine, work)
    assert given_back[0].nbytes > 0


def test_a_full_cache_changes_no_text(make_engine: Maker, prompt_ids: Prompt) -> None:
    requests = [GenerationRequest(prompt_ids, 200), *(_sampled(prompt_ids, s) for s in range(3))]
    requests += [GenerationRequest(prompt_ids[:n], 200) for n in (2, 3, 4)]
    roomy = make_engine()
    expected = _run(roomy, lambda: _texts(roomy.generate(requests), 7))
    tight = make_engine(max_num_batched_tokens=64, kv_cache_bytes=700_000)
    preempted: list[bool] = []

    async def work() -> list[str]:
        offloading = tight._batcher._manager.batch_processor.offloading_manager  # type: ignore[union-attr]
        preempt = offloading.offload_requests

        def counted() -> bool:
            preempted.append(preempt())
            return preempted[-1]

        offloading.offload_requests = counted
        return await _texts(tight.generate(requests), 7)

    assert _run(tight, work) == expected
    assert any(preempted)


def test_every_step_together_changes_no_text_when_the_cache_is_full(
    make_engine: Maker, codec: ModelTokenizer, prompt_ids: Prompt
) -> None:
    """What is kept for a request survives its preemption; log-probabilities stay in step."""

    async def work(engine: Engine) -> list[Logprobs]:
        grammar = await engine.grammar_compiler.compile(GrammarSource("regex", "[a-z ]{120,500}"))
        choosings = [
            SamplingParams(DrawParams(1.0, seed=seed), n_logprobs=1, **asked)
            for seed in range(3)
            for asked in (
                {"penalties": Penalties(presence=0.5, frequency=0.3, repetition=1.3)},
                {"grammar": grammar},
                {
                    "logit_bias": LogitBias(
                        biases=((3, -100.0), (40, 2.0)), bad_words_token_ids=((50, 60), (70,))
                    )
                },
            )
        ]
        requests = [GenerationRequest(prompt_ids, 200, choosing) for choosing in choosings]
        told: list[Logprobs] = [[] for _ in requests]
        async with engine.generate(requests) as generation:
            async for index, delta in generation:
                told[index] += [(at, entry.token, entry.logprob) for at, entry in delta.logprobs]
        return told

    roomy = make_engine()
    expected = _run(roomy, lambda: work(roomy))
    assert min(map(len, expected)) > 20
    tight = make_engine(max_num_batched_tokens=64, kv_cache_bytes=700_000)
    preempted: list[bool] = []

    async def work_tightly() -> list[Logprobs]:
        offloading = tight._batcher._manager.batch_processor.offloading_manager  # type: ignore[union-attr]
        preempt = offloading.offload_requests

        def counted() -> bool:
            preempted.append(preempt())
            return preempted[-1]

        offloading.offload_requests = counted
        return await work(tight)

    found = _run(tight, work_tightly)
    assert any(preempted)
    for mine, others in zip(found, expected, strict=True):
        assert [entry[:2] for entry in mine] == [entry[:2] for entry in others]
        assert [entry[2] for entry in mine] == pytest.approx(
            [entry[2] for entry in others], abs=1e-3
        )


def test_log_probabilities_are_the_models_own_whatever_chooses(
    make_engine: Maker, base_model: Any, prompt_ids: Prompt
) -> None:
    engine = make_engine()
    choosing = SamplingParams(
        DrawParams(1.7, top_k=40, seed=5),
        penalties=Penalties(presence=1.0),
        logit_bias=LogitBias(biases=((9, 3.0),)),
        n_logprobs=2,
    )

    async def work() -> list[Any]:
        request = GenerationRequest(prompt_ids, 12, choosing, include_special_tokens=True)
        async with engine.generate([request]) as generation:
            return [entry async for _, delta in generation for _, entry in delta.logprobs]

    entries = _run(engine, work)
    assert len(entries) == 12
    ids = torch.tensor([[*prompt_ids, *(entry.token for entry in entries)]])  # [1, T]
    with torch.no_grad():
        logprobs = base_model(ids).logits[0].float().log_softmax(-1)  # [T, V]
    for at, entry in enumerate(entries, start=len(prompt_ids) - 1):
        assert entry.logprob == pytest.approx(logprobs[at, entry.token].item(), abs=1e-4)
        values, tokens = logprobs[at].topk(2)
        assert [token for token, _ in entry.top_logprobs] == tokens.tolist()
        assert [value for _, value in entry.top_logprobs] == pytest.approx(
            values.tolist(), abs=1e-4
        )


def test_constraints_that_leave_nothing_end_their_request_alone(
    make_engine: Maker, codec: ModelTokenizer, greedy: Greedy, prompt_ids: Prompt
) -> None:
    engine = make_engine()

    async def work() -> None:
        digits = await engine.grammar_compiler.compile(GrammarSource("regex", "[0-9]{5}"))
        letter = LogitBias(allowed_token_ids=tuple(codec.encode("x")))
        whole = engine.generate([GenerationRequest(prompt_ids, 40)])
        nothing = GenerationRequest(
            prompt_ids, 20, SamplingParams(logit_bias=letter, grammar=digits)
        )
        with pytest.raises(NoTokenAllowed, match="leave no token"):
            await _texts(engine.generate([nothing]))
        assert await _texts(whole) == [codec.decode(greedy(prompt_ids, 40))]
        await _until(lambda: engine._request_counts() == (0, 0))

    _run(engine, work)


def test_a_grammars_end_ends_the_text_and_frees_the_request(
    make_engine: Maker, prompt_ids: Prompt
) -> None:
    engine = make_engine()

    async def work() -> None:
        grammar = await engine.grammar_compiler.compile(GrammarSource("choice", '["abc"]'))
        request = GenerationRequest(prompt_ids, 200, SamplingParams(grammar=grammar))
        async with engine.generate([request]) as generation:
            deltas = [delta async for _, delta in generation]
        assert "".join(delta.text for delta in deltas) == "abc"
        assert deltas[-1].finish_reason == "stop"
        await _until(lambda: engine._request_counts() == (0, 0))

    _run(engine, work)


def test_an_end_token_ends_the_text(
    make_engine: Maker, model: Any, codec: ModelTokenizer, greedy: Greedy, prompt_ids: Prompt
) -> None:
    tokens = greedy(prompt_ids, 20)
    end = tokens[10]
    model.generation_config.eos_token_id = [0, end]
    request = GenerationRequest(prompt_ids, 20)
    engine = make_engine()

    async def work() -> None:
        reasons = [d.finish_reason async for _, d in engine.generate([request])]
        assert reasons == [*[None] * tokens.index(end), "stop"]
        ignoring = GenerationRequest(
            prompt_ids, 20, stop_conditions=StopConditions(ignore_eos=True)
        )
        assert await _texts(engine.generate([ignoring])) == [codec.decode(tokens)]

    _run(engine, work)


def test_a_stop_string_ends_the_text_and_frees_the_request(
    make_engine: Maker, codec: ModelTokenizer, greedy: Greedy, prompt_ids: Prompt
) -> None:
    text = codec.decode(greedy(prompt_ids, 60))
    stop = text[20:23]
    engine = make_engine()

    async def work() -> None:
        request = GenerationRequest(
            prompt_ids, 200, stop_conditions=StopConditions(stop_strings=(stop,))
        )
        assert await _texts(engine.generate([request])) == [text[: text.index(stop)]]
        await _until(lambda: engine._request_counts() == (0, 0))

    _run(engine, work)


def test_leaving_a_generation_frees_its_requests(make_engine: Maker, prompt_ids: Prompt) -> None:
    engine = make_engine(max_num_seqs=1)

    async def work() -> None:
        requests = [GenerationRequest(prompt_ids, 230)] * 3
        async with engine.generate(requests) as generation:
            await anext(aiter(generation))
            assert engine._request_counts() == (1, 2)
        await _until(lambda: engine._request_counts() == (0, 0))
        assert not engine.is_busy

    _run(engine, work)


def test_waiting_requests_run_after_a_full_cache_was_freed_by_cancelling(
    make_engine: Maker, prompt_ids: Prompt
) -> None:
    """transformers' own scheduler would let them wait for ever."""
    engine = make_engine(max_num_batched_tokens=64)

    async def work() -> None:
        async with engine.generate([GenerationRequest(prompt_ids, 230)]) as generation:
            await anext(aiter(generation))
            engine._batcher._manager.batch_processor.scheduler.block_new_requests = True  # type: ignore[union-attr]
            waiting = engine.generate([GenerationRequest(prompt_ids, 3)])
        await _texts(waiting)

    _run(engine, work)


def test_a_request_that_takes_longer_than_any_may_is_ended_and_freed(
    make_engine: Maker, model: Any, prompt_ids: Prompt
) -> None:
    engine = make_engine()
    engine._request_timeout_s = 0.3
    forward, slow = model.forward, threading.Event()

    def slowly(**given: Any) -> Any:
        slow.wait(0.05)
        return forward(**given)

    model.forward = slowly

    async def work() -> None:
        with pytest.raises(GenerationFailed, match=r"within 0.3 s"):
            await _texts(engine.generate([GenerationRequest(prompt_ids, 200)]))
        await _until(lambda: engine._request_counts() == (0, 0))
        await _texts(engine.generate([GenerationRequest(prompt_ids, 2)]))

    _run(engine, work)


def test_refuses_more_than_may_wait(make_engine: Maker, prompt_ids: Prompt) -> None:
    engine = make_engine(max_num_seqs=1, max_waiting=1)

    async def work() -> None:
        with pytest.raises(EngineQueueFull, match="at most 2 may be"):
            engine.generate([GenerationRequest(prompt_ids, 5)] * 3)
        await _texts(engine.generate([GenerationRequest(prompt_ids, 5)] * 2), 2)

    _run(engine, work)


@pytest.mark.parametrize("sampling", [GREEDY, DrawParams(1.0, seed=3)])
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_scores_that_are_not_finite_end_their_request_alone(
    make_engine: Maker,
    model: Any,
    codec: ModelTokenizer,
    greedy: Greedy,
    prompt_ids: Prompt,
    number: float,
    sampling: DrawParams,
) -> None:
    mark = codec.encode("~")[0]
    forward = model.forward

    def broken(*, input_ids: Tensor, **given: Any) -> Any:
        output = forward(input_ids=input_ids, **{**given, "logits_to_keep": 0})
        output.logits[input_ids == mark] = number  # [1, T, V]
        if "logits_to_keep" in given:
            output.logits = output.logits[:, given["logits_to_keep"]]
        return output

    model.forward = broken
    engine = make_engine()

    async def work() -> None:
        marked = GenerationRequest((*prompt_ids, mark), 20, SamplingParams(sampling))
        whole = engine.generate([GenerationRequest(prompt_ids, 40)])
        with pytest.raises(GenerationFailed, match="not finite"):
            await anext(aiter(engine.generate([marked])))
        assert await _texts(whole) == [codec.decode(greedy(prompt_ids, 40))]
        await _until(lambda: engine._request_counts() == (0, 0))
        assert engine.is_ready

    _run(engine, work)


def test_after_a_fatal_error_the_engine_starts_again_and_what_ran_goes_on(
    make_engine: Maker, model: Any, codec: ModelTokenizer, greedy: Greedy, prompt_ids: Prompt
) -> None:
    engine = make_engine()
    forward = model.forward

    async def work() -> None:
        first = engine._batcher

        def broken(**given: Any) -> Any:
            if engine._batcher is first:
                raise RuntimeError("the device is gone")
            return forward(**given)

        model.forward = broken
        running = await _generate_until_crash(engine, prompt_ids)
        with pytest.raises(EngineUnavailable):
            engine.generate([GenerationRequest(prompt_ids, 5)])
        assert await _texts(running) == [codec.decode(greedy(prompt_ids, 5))]
        texts = await _texts(engine.generate([GenerationRequest(prompt_ids, 5)]))
        assert texts == [codec.decode(greedy(prompt_ids, 5))]

    _run(engine, work)


def test_gives_up_when_errors_come_back(
    make_engine: Maker, model: Any, prompt_ids: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_module, "RESTART_LIMIT", 1)
    engine = make_engine()
    given_up = asyncio.Event()
    engine._supervisor._on_give_up = given_up.set

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("the device is gone")

    async def work() -> None:
        model.forward = broken
        while not given_up.is_set():
            await _until(lambda: engine.is_ready or given_up.is_set())
            with pytest.raises((EngineUnavailable, GenerationFailed)):
                await _texts(engine.generate([GenerationRequest(prompt_ids, 5)]))
        assert not engine.is_ready

    _run(engine, work)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_gives_up_at_once_when_the_store_is_gone(
    make_engine: Maker, model: Any, prompt_ids: Prompt, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine()
    given_up = asyncio.Event()
    engine._supervisor._on_give_up = given_up.set

    def broken(*_: Any, **__: Any) -> None:
        raise StoreUnreadable("the store is gone")

    async def work() -> None:
        model.forward = broken
        with pytest.raises(GenerationFailed):
            await _texts(engine.generate([GenerationRequest(prompt_ids, 5)]))
        await given_up.wait()
        assert not engine.is_ready

    _run(engine, work)
    assert "The engine gives up: the store is gone" in caplog.messages


def test_stopping_ends_running_requests_and_leaves_no_thread(
    make_engine: Maker, prompt_ids: Prompt
) -> None:
    before = set(threading.enumerate())
    engine = make_engine()

    async def work() -> None:
        async with engine:
            generation = engine.generate([GenerationRequest(prompt_ids, 230)])
            await anext(aiter(generation))
        with pytest.raises(GenerationFailed):
            await _texts(generation)

    asyncio.run(work())
    left = set(threading.enumerate()) - before
    assert not [t for t in left if t.is_alive() and not t.daemon]


def test_refuses_a_cache_too_small_for_one_request(make_engine: Maker) -> None:
    engine = make_engine(kv_cache_bytes=1000)
    with pytest.raises(RouterConfigError, match="kv_cache_bytes: got 1000"):
        _run(engine, lambda: asyncio.sleep(0))


def test_counts_what_it_does(make_engine: Maker, prompt_ids: Prompt) -> None:
    engine = make_engine()
    _run(engine, lambda: _texts(engine.generate([GenerationRequest(prompt_ids, 6)])))
    metrics = engine.metrics
    assert metrics.prompt_tokens._value.get() == len(prompt_ids)
    assert metrics.generation_tokens._value.get() == 6
