import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
import torch
from tiny_engine import manager_of, run_here
from torch import Tensor

from faasmoe_kernels import load
from faasmoe_router.engine import supervisor
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
    ModelPartUnavailable,
    NoTokenAllowed,
    RouterConfigError,
    StoreUnreadable,
)
from faasmoe_transformers import scheduler
from faasmoe_transformers.error_isolation import MAX_ISOLATED_FAILURES
from faasmoe_transformers.tensor_pages import release_pages

DEADLINE_S = 120.0
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


def test_on_idle_is_called_once_no_request_is_present(
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
    make_engine: Maker, model_tokenizer: ModelTokenizer, greedy: Greedy
) -> None:
    prompts = [tuple(model_tokenizer.encode(text)) for text in ("a", "lazy dog " * 5, "the quick")]
    expected = [model_tokenizer.decode(greedy(prompt, 40)) for prompt in prompts]
    engine = make_engine()
    requests = [GenerationRequest(prompt, 40) for prompt in prompts]
    assert _run(engine, lambda: _texts(engine.generate(requests), 3)) == expected


def test_prompt_longer_than_a_batch_is_prefilled_in_chunks(
    make_engine: Maker, model_tokenizer: ModelTokenizer, greedy: Greedy
) -> None:
    prompt = tuple(model_tokenizer.encode("jumps over the lazy dog " * 6))
    engine = make_engine(max_num_seqs=2, max_num_batched_tokens=8)
    assert len(prompt) > 24
    texts = _run(engine, lambda: _texts(engine.generate([GenerationRequest(prompt, 10)])))
    assert texts == [model_tokenizer.decode(greedy(prompt, 10))]


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compute with torch, whatever is installed."""
    monkeypatch.setenv("FAASMOE_KERNELS", "off")
    load.cache_clear()
    yield
    load.cache_clear()


@pytest.mark.usefixtures("without_kernels")
def test_eager_attention_equals_generate_too(
    make_engine: Maker,
    model: Any,
    model_tokenizer: ModelTokenizer,
    greedy: Greedy,
    prompt_ids: Prompt,
) -> None:
    model._supports_sdpa = False
    engine = make_engine()
    texts = _run(engine, lambda: _texts(engine.generate([GenerationRequest(prompt_ids, 12)])))
    assert model.config._attn_implementation == "paged|eager"
    assert texts == [model_tokenizer.decode(greedy(prompt_ids, 12))]


def test_seeded_text_does_not_depend_on_the_batch(
    make_engine: Maker, model_tokenizer: ModelTokenizer, greedy: Greedy, prompt_ids: Prompt
) -> None:
    engine = make_engine()
    mine = _sampled(prompt_ids, 7, top_p=0.95)
    others = [GenerationRequest(prompt_ids, 30), _sampled(prompt_ids, 8), _sampled(prompt_ids, 9)]

    async def work() -> None:
        alone = await _texts(engine.generate([mine]))
        assert await _texts(engine.generate([mine])) == alone
        together = await _texts(engine.generate([others[0], mine, *others[1:]]), 4)
        assert together[1] == alone[0]
        assert together[0] == model_tokenizer.decode(greedy(prompt_ids, 30))
        assert len(set(together)) == 4

    _run(engine, work)


def test_idle_reclaim_does_not_change_texts(
    make_engine: Maker, prompt_ids: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    released: list[Tensor] = []

    def release(tensor: Tensor) -> None:
        released.append(tensor)
        release_pages(tensor)

    monkeypatch.setattr(scheduler, "release_pages", release)
    monkeypatch.setattr("faasmoe_transformers.scheduler.IDLE_RECLAIM_DELAY_S", 0.0)
    engine = make_engine()

    async def work() -> None:
        first = await _texts(engine.generate([GenerationRequest(prompt_ids, 12)]))
        await _until(lambda: len(released) == 1)
        assert await _texts(engine.generate([GenerationRequest(prompt_ids, 12)])) == first
        await _until(lambda: len(released) == 2)

    _run(engine, work)
    assert released[0].nbytes > 0


def test_full_cache_does_not_change_texts(make_engine: Maker, prompt_ids: Prompt) -> None:
    requests = [GenerationRequest(prompt_ids, 200), *(_sampled(prompt_ids, s) for s in range(3))]
    requests += [GenerationRequest(prompt_ids[:n], 200) for n in (2, 3, 4)]
    roomy = make_engine()
    expected = _run(roomy, lambda: _texts(roomy.generate(requests), 7))
    tight = make_engine(max_num_batched_tokens=64, kv_cache_bytes=700_000)
    preempted: list[bool] = []

    async def work() -> list[str]:
        offloading = manager_of(tight).batch_processor.offloading_manager
        preempt = offloading.offload_requests

        def counted() -> bool:
            preempted.append(preempt())
            return preempted[-1]

        offloading.offload_requests = counted
        return await _texts(tight.generate(requests), 7)

    assert _run(tight, work) == expected
    assert any(preempted)


def test_full_cache_does_not_change_texts_with_all_sampling_options(
    make_engine: Maker, model_tokenizer: ModelTokenizer, prompt_ids: Prompt
) -> None:
    """The sampling state survives preemption; log-probabilities stay aligned with tokens."""

    async def work(engine: Engine) -> list[Logprobs]:
        grammar = await engine.grammar_compiler.compile(
            GrammarSource("regex", "[a-z ]{120,500}"), run_here
        )
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
        logprobs: list[Logprobs] = [[] for _ in requests]
        async with engine.generate(requests) as generation:
            async for index, delta in generation:
                logprobs[index] += [
                    (at, entry.token, entry.logprob) for at, entry in delta.logprobs
                ]
        return logprobs

    roomy = make_engine()
    expected = _run(roomy, lambda: work(roomy))
    assert min(map(len, expected)) > 20
    tight = make_engine(max_num_batched_tokens=64, kv_cache_bytes=700_000)
    preempted: list[bool] = []

    async def work_tightly() -> list[Logprobs]:
        offloading = manager_of(tight).batch_processor.offloading_manager
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


def test_log_probabilities_are_those_of_the_unmodified_scores(
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


def test_unsatisfiable_constraints_fail_only_their_request(
    make_engine: Maker, model_tokenizer: ModelTokenizer, greedy: Greedy, prompt_ids: Prompt
) -> None:
    engine = make_engine()

    async def work() -> None:
        digits = await engine.grammar_compiler.compile(GrammarSource("regex", "[0-9]{5}"), run_here)
        letter = LogitBias(allowed_token_ids=tuple(model_tokenizer.encode("x")))
        whole = engine.generate([GenerationRequest(prompt_ids, 40)])
        nothing = GenerationRequest(
            prompt_ids, 20, SamplingParams(logit_bias=letter, grammar=digits)
        )
        with pytest.raises(NoTokenAllowed, match="leave no token"):
            await _texts(engine.generate([nothing]))
        assert await _texts(whole) == [model_tokenizer.decode(greedy(prompt_ids, 40))]
        await _until(lambda: engine.request_counts() == (0, 0))

    _run(engine, work)


def test_end_of_grammar_finishes_and_frees_the_request(
    make_engine: Maker, prompt_ids: Prompt
) -> None:
    engine = make_engine()

    async def work() -> None:
        grammar = await engine.grammar_compiler.compile(
            GrammarSource("choice", '["abc"]'), run_here
        )
        request = GenerationRequest(prompt_ids, 200, SamplingParams(grammar=grammar))
        async with engine.generate([request]) as generation:
            deltas = [delta async for _, delta in generation]
        assert "".join(delta.text for delta in deltas) == "abc"
        assert deltas[-1].finish_reason == "stop"
        await _until(lambda: engine.request_counts() == (0, 0))

    _run(engine, work)


def test_eos_token_finishes_the_text(
    make_engine: Maker,
    model: Any,
    model_tokenizer: ModelTokenizer,
    greedy: Greedy,
    prompt_ids: Prompt,
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
        assert await _texts(engine.generate([ignoring])) == [model_tokenizer.decode(tokens)]

    _run(engine, work)


def test_stop_string_finishes_and_frees_the_request(
    make_engine: Maker, model_tokenizer: ModelTokenizer, greedy: Greedy, prompt_ids: Prompt
) -> None:
    text = model_tokenizer.decode(greedy(prompt_ids, 60))
    stop = text[20:23]
    engine = make_engine()

    async def work() -> None:
        request = GenerationRequest(
            prompt_ids, 200, stop_conditions=StopConditions(stop_strings=(stop,))
        )
        assert await _texts(engine.generate([request])) == [text[: text.index(stop)]]
        await _until(lambda: engine.request_counts() == (0, 0))

    _run(engine, work)


def test_leaving_a_generation_aborts_its_requests(make_engine: Maker, prompt_ids: Prompt) -> None:
    engine = make_engine(max_num_seqs=1)

    async def work() -> None:
        requests = [GenerationRequest(prompt_ids, 230)] * 3
        async with engine.generate(requests) as generation:
            await anext(aiter(generation))
            assert engine.request_counts() == (1, 2)
        await _until(lambda: engine.request_counts() == (0, 0))
        assert not engine.is_busy

    _run(engine, work)


def test_cancelling_unblocks_requests_that_wait_for_a_full_cache(
    make_engine: Maker, prompt_ids: Prompt
) -> None:
    """transformers' own scheduler would never admit them."""
    engine = make_engine(max_num_batched_tokens=64)

    async def work() -> None:
        async with engine.generate([GenerationRequest(prompt_ids, 230)]) as generation:
            await anext(aiter(generation))
            manager_of(engine).batch_processor.scheduler.block_new_requests = True
            waiting = engine.generate([GenerationRequest(prompt_ids, 3)])
        await _texts(waiting)

    _run(engine, work)


def test_timed_out_request_fails_and_is_freed(
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
        await _until(lambda: engine.request_counts() == (0, 0))
        engine._request_timeout_s = DEADLINE_S
        await _texts(engine.generate([GenerationRequest(prompt_ids, 2)]))

    _run(engine, work)


def test_rejects_requests_beyond_the_queue_limit(make_engine: Maker, prompt_ids: Prompt) -> None:
    engine = make_engine(max_num_seqs=1, max_waiting=1)

    async def work() -> None:
        with pytest.raises(EngineQueueFull, match="at most 2 may be"):
            engine.generate([GenerationRequest(prompt_ids, 5)] * 3)
        await _texts(engine.generate([GenerationRequest(prompt_ids, 5)] * 2), 2)

    _run(engine, work)


@pytest.mark.parametrize("sampling", [GREEDY, DrawParams(1.0, seed=3)])
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_scores_fail_only_their_request(
    make_engine: Maker,
    model: Any,
    model_tokenizer: ModelTokenizer,
    greedy: Greedy,
    prompt_ids: Prompt,
    number: float,
    sampling: DrawParams,
) -> None:
    mark = model_tokenizer.encode("~")[0]
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
        assert await _texts(whole) == [model_tokenizer.decode(greedy(prompt_ids, 40))]
        await _until(lambda: engine.request_counts() == (0, 0))
        assert engine.is_ready

    _run(engine, work)


def test_engine_restarts_after_a_crash_and_resumes_requests(
    make_engine: Maker,
    model: Any,
    model_tokenizer: ModelTokenizer,
    greedy: Greedy,
    prompt_ids: Prompt,
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
        assert await _texts(running) == [model_tokenizer.decode(greedy(prompt_ids, 5))]
        texts = await _texts(engine.generate([GenerationRequest(prompt_ids, 5)]))
        assert texts == [model_tokenizer.decode(greedy(prompt_ids, 5))]

    _run(engine, work)


def test_gives_up_when_the_restart_budget_is_used_up(
    make_engine: Maker, model: Any, prompt_ids: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "RESTART_LIMIT", 1)
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


def test_recovers_when_the_store_is_back(
    make_engine: Maker, model: Any, prompt_ids: Prompt
) -> None:
    engine = make_engine()
    forward = model.forward

    def broken(*_: Any, **__: Any) -> None:
        raise StoreUnreadable("the store is away")

    async def work() -> list[str]:
        model.forward = broken
        for _ in range(5):  # more often than an engine may fail
            with pytest.raises(ModelPartUnavailable, match="not available at the moment"):
                await _texts(engine.generate([GenerationRequest(prompt_ids, 5)]))
        model.forward = forward
        assert engine.is_ready
        return await _texts(engine.generate([GenerationRequest(prompt_ids, 5)]))

    assert _run(engine, work)


def test_stop_fails_running_requests_and_ends_the_thread(
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


def test_rejects_a_cache_too_small_for_one_request(make_engine: Maker) -> None:
    engine = make_engine(kv_cache_bytes=1000)
    with pytest.raises(RouterConfigError, match="kv_cache_bytes: got 1000"):
        _run(engine, lambda: asyncio.sleep(0))


def test_metrics_count_requests_and_tokens(make_engine: Maker, prompt_ids: Prompt) -> None:
    engine = make_engine()
    _run(engine, lambda: _texts(engine.generate([GenerationRequest(prompt_ids, 6)])))
    metrics = engine.metrics
    assert metrics.prompt_tokens._value.get() == len(prompt_ids)
    assert metrics.generation_tokens._value.get() == 6
    [family] = metrics._step_tokens.collect()
    steps = {sample.name: sample.value for sample in family.samples}
    assert steps["vllm:iteration_tokens_total_sum"] == len(prompt_ids) + 6
    assert steps["vllm:iteration_tokens_total_count"] == 6
