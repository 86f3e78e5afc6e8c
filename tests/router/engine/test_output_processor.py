import asyncio

import pytest

from faasmoe_router.engine.generation import (
    CompletionOutput,
    Generation,
    GenerationRequest,
    SamplingParams,
    StopConditions,
)
from faasmoe_router.engine.logits_state import LogitsState
from faasmoe_router.engine.output_processor import SequenceOutputProcessor
from faasmoe_router.engine.sampler import SampledLogprob
from faasmoe_router.engine.tokenizer import ModelTokenizer
from faasmoe_router.errors import GenerationFailed

EOS_TOKEN_ID = 0


def _output_processor(codec: ModelTokenizer, request: GenerationRequest) -> SequenceOutputProcessor:
    return SequenceOutputProcessor(
        request,
        detokenizer=codec.new_detokenizer(),
        stop_token_ids=request.stop_conditions.all_stop_token_ids((EOS_TOKEN_ID, 1)),
    )


def _request(stops: tuple[str, ...] = (), *, max_tokens: int = 99) -> GenerationRequest:
    return GenerationRequest(
        (5,), max_tokens=max_tokens, stop_conditions=StopConditions(stop_strings=stops)
    )


def test_text_ends_before_a_stop_string_across_tokens(codec: ModelTokenizer) -> None:
    sequence = _output_processor(codec, _request(("XYZ",)))
    deltas = [sequence.process_tokens([token]) for token in codec.encode("aXbXYZ")]
    assert "".join(delta.text for delta in deltas) == "aXb"
    assert [delta.finish_reason for delta in deltas] == [None] * 5 + ["stop"]
    assert sequence.n_tokens == 6


@pytest.mark.parametrize("end", [0, 1])
def test_any_end_token_ends_the_text_and_is_not_in_it(codec: ModelTokenizer, end: int) -> None:
    delta = _output_processor(codec, _request()).process_tokens([*codec.encode("ab"), end, 9])
    assert delta == CompletionOutput("ab", 3, "stop")


def test_what_was_held_back_is_told_at_the_end(codec: ModelTokenizer) -> None:
    delta = _output_processor(codec, _request(("XYZ",))).process_tokens(
        [*codec.encode("aXY"), EOS_TOKEN_ID]
    )
    assert delta == CompletionOutput("aXY", 4, "stop")


def test_the_limit_ends_the_text(codec: ModelTokenizer) -> None:
    delta = _output_processor(codec, _request(max_tokens=2)).process_tokens(codec.encode("XYZ"))
    assert delta == CompletionOutput("XY", 2, "length")


def test_half_a_character_is_told_at_the_limit_only(codec: ModelTokenizer) -> None:
    sequence = _output_processor(codec, _request(max_tokens=3))
    ids = codec.encode("a日")[:3]
    assert [sequence.process_tokens([token]).text for token in ids] == ["a", "", "�"]


def test_end_token_is_text_like_any_other_when_ignored(codec: ModelTokenizer) -> None:
    request = GenerationRequest((5,), max_tokens=3, stop_conditions=StopConditions(ignore_eos=True))
    delta = _output_processor(codec, request).process_tokens([EOS_TOKEN_ID, *codec.encode("ab")])
    assert delta == CompletionOutput("ab", 3, "length")


def test_a_stop_token_ends_the_text_even_where_end_tokens_are_ignored(
    codec: ModelTokenizer,
) -> None:
    [stop] = codec.encode("z")
    request = GenerationRequest(
        (5,), 9, stop_conditions=StopConditions(stop_token_ids=(stop,), ignore_eos=True)
    )
    delta = _output_processor(codec, request).process_tokens(
        [*codec.encode("ab"), EOS_TOKEN_ID, stop, 9]
    )
    assert delta == CompletionOutput("ab", 4, "stop", stop_reason=stop)


def test_what_ends_the_text_is_in_it_if_asked_for(codec: ModelTokenizer) -> None:
    tokens = codec.encode("aXYb")
    ending = StopConditions(stop_strings=("XY",), include_stop=True)
    sequence = _output_processor(codec, GenerationRequest((5,), 9, stop_conditions=ending))
    assert sequence.process_tokens(tokens) == CompletionOutput("aXY", 3, "stop", stop_reason="XY")
    ending = StopConditions(stop_token_ids=(tokens[1],), include_stop=True)
    sequence = _output_processor(codec, GenerationRequest((5,), 9, stop_conditions=ending))
    assert sequence.process_tokens(tokens) == CompletionOutput(
        "aX", 2, "stop", stop_reason=tokens[1]
    )


def test_stop_strings_count_after_the_least_tokens_only(codec: ModelTokenizer) -> None:
    ending = StopConditions(stop_strings=("X",), min_tokens=2)
    sequence = _output_processor(codec, GenerationRequest((5,), 9, stop_conditions=ending))
    assert sequence.process_tokens(codec.encode("aXbXc")) == CompletionOutput(
        "aXb", 4, "stop", stop_reason="X"
    )


def test_log_probabilities_come_with_the_text_that_they_are_of(codec: ModelTokenizer) -> None:
    """Held back with it, where it may begin a stop string, and dropped with the stop string."""
    ids = codec.encode("aXYXYZ")
    request = GenerationRequest(
        (5,),
        9,
        sampling_params=SamplingParams(n_logprobs=0),
        stop_conditions=StopConditions(stop_strings=("XYZ",)),
    )
    steps = LogitsState(request, [])
    assert steps.logprob_queue is not None
    for token in ids:
        steps.logprob_queue.append(SampledLogprob(token, -1.0))
    sequence = SequenceOutputProcessor(
        request, detokenizer=codec.new_detokenizer(), stop_token_ids=(), logits_state=steps
    )
    deltas = [sequence.process_tokens([token]) for token in ids]
    told = [[(at, entry.token) for at, entry in delta.logprobs] for delta in deltas]
    assert [delta.text for delta in deltas] == ["a", "", "", "XY", "", ""]
    assert told == [[(0, ids[0])], [], [], [(1, ids[1]), (2, ids[2])], [], []]


def test_a_generation_ends_when_all_its_sequences_have() -> None:
    async def read() -> list[tuple[int, CompletionOutput]]:
        generation = Generation(2, lambda: None)
        for index, reason in ((0, None), (1, "stop"), (0, "length")):
            generation.put_output(index, CompletionOutput("x", 1, reason))  # type: ignore[arg-type]
        return [event async for event in generation]

    assert [index for index, _ in asyncio.run(read())] == [0, 1, 0]


def test_a_failure_reaches_the_reader_and_frees_the_rest() -> None:
    cancelled: list[bool] = []

    async def read() -> None:
        generation = Generation(2, lambda: cancelled.append(True))
        generation.fail(GenerationFailed("lost"))
        async with generation:
            async for _ in generation:
                pass

    with pytest.raises(GenerationFailed, match="lost"):
        asyncio.run(read())
    assert cancelled == [True]
