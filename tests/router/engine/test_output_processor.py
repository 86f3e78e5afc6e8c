"""Detokenization, stop conditions and log-probabilities of one sequence."""

from dataclasses import replace

import pytest

from faasmoe_router.engine.batch_sampler import LogitsState
from faasmoe_router.engine.generation import (
    CompletionOutput,
    GenerationRequest,
    SamplingParams,
    StopConditions,
)
from faasmoe_router.engine.output_processor import SequenceOutputProcessor
from faasmoe_router.engine.sampler import SampledLogprob
from faasmoe_router.engine.structured_output import GrammarSource, compile_grammar
from faasmoe_router.engine.tokenizer import ModelTokenizer

EOS_TOKEN_ID = 0


def _output_processor(
    model_tokenizer: ModelTokenizer, request: GenerationRequest
) -> SequenceOutputProcessor:
    return SequenceOutputProcessor(
        request,
        detokenizer=model_tokenizer.new_detokenizer(),
        stop_token_ids=request.stop_conditions.all_stop_token_ids((EOS_TOKEN_ID, 1)),
    )


def without_token_ids(output: CompletionOutput) -> CompletionOutput:
    """Return an output without its tokens, which have a test of their own."""
    return replace(output, token_ids=())


def _request(stops: tuple[str, ...] = (), *, max_tokens: int = 99) -> GenerationRequest:
    return GenerationRequest(
        (5,), max_tokens=max_tokens, stop_conditions=StopConditions(stop_strings=stops)
    )


def test_stops_before_stop_string_spanning_tokens(model_tokenizer: ModelTokenizer) -> None:
    processor = _output_processor(model_tokenizer, _request(("XYZ",)))
    outputs = [processor.process_tokens([token]) for token in model_tokenizer.encode("aXbXYZ")]
    assert "".join(output.text for output in outputs) == "aXb"
    assert [output.finish_reason for output in outputs] == [None] * 5 + ["stop"]
    assert processor.n_tokens == 6


@pytest.mark.parametrize("eos", [0, 1])
def test_any_eos_token_ends_the_text_and_is_excluded(
    model_tokenizer: ModelTokenizer, eos: int
) -> None:
    output = _output_processor(model_tokenizer, _request()).process_tokens(
        [*model_tokenizer.encode("ab"), eos, 9]
    )
    assert without_token_ids(output) == CompletionOutput("ab", 3, "stop")


def test_held_back_text_is_emitted_at_the_end(model_tokenizer: ModelTokenizer) -> None:
    output = _output_processor(model_tokenizer, _request(("XYZ",))).process_tokens(
        [*model_tokenizer.encode("aXY"), EOS_TOKEN_ID]
    )
    assert without_token_ids(output) == CompletionOutput("aXY", 4, "stop")


def test_max_tokens_ends_the_text(model_tokenizer: ModelTokenizer) -> None:
    output = _output_processor(model_tokenizer, _request(max_tokens=2)).process_tokens(
        model_tokenizer.encode("XYZ")
    )
    assert without_token_ids(output) == CompletionOutput("XY", 2, "length")


def test_incomplete_character_is_emitted_at_the_end_only(model_tokenizer: ModelTokenizer) -> None:
    processor = _output_processor(model_tokenizer, _request(max_tokens=3))
    ids = model_tokenizer.encode("a日")[:3]
    assert [processor.process_tokens([token]).text for token in ids] == ["a", "", "�"]


def test_ignored_eos_token_does_not_end_the_text(model_tokenizer: ModelTokenizer) -> None:
    request = GenerationRequest((5,), max_tokens=3, stop_conditions=StopConditions(ignore_eos=True))
    output = _output_processor(model_tokenizer, request).process_tokens(
        [EOS_TOKEN_ID, *model_tokenizer.encode("ab")]
    )
    assert without_token_ids(output) == CompletionOutput("ab", 3, "length")


def test_stop_token_ends_the_text_despite_ignore_eos(model_tokenizer: ModelTokenizer) -> None:
    [stop] = model_tokenizer.encode("z")
    request = GenerationRequest(
        (5,), 9, stop_conditions=StopConditions(stop_token_ids=(stop,), ignore_eos=True)
    )
    output = _output_processor(model_tokenizer, request).process_tokens(
        [*model_tokenizer.encode("ab"), EOS_TOKEN_ID, stop, 9]
    )
    assert without_token_ids(output) == CompletionOutput("ab", 4, "stop", stop_reason=stop)


def test_include_stop_keeps_stop_string_and_stop_token_in_the_text(
    model_tokenizer: ModelTokenizer,
) -> None:
    tokens = model_tokenizer.encode("aXYb")
    stop_conditions = StopConditions(stop_strings=("XY",), include_stop=True)
    processor = _output_processor(
        model_tokenizer, GenerationRequest((5,), 9, stop_conditions=stop_conditions)
    )
    assert without_token_ids(processor.process_tokens(tokens)) == CompletionOutput(
        "aXY", 3, "stop", stop_reason="XY"
    )
    stop_conditions = StopConditions(stop_token_ids=(tokens[1],), include_stop=True)
    processor = _output_processor(
        model_tokenizer, GenerationRequest((5,), 9, stop_conditions=stop_conditions)
    )
    assert without_token_ids(processor.process_tokens(tokens)) == CompletionOutput(
        "aX", 2, "stop", stop_reason=tokens[1]
    )


def test_stop_strings_are_ignored_before_min_tokens(model_tokenizer: ModelTokenizer) -> None:
    stop_conditions = StopConditions(stop_strings=("X",), min_tokens=2)
    processor = _output_processor(
        model_tokenizer, GenerationRequest((5,), 9, stop_conditions=stop_conditions)
    )
    assert without_token_ids(
        processor.process_tokens(model_tokenizer.encode("aXbXc"))
    ) == CompletionOutput("aXb", 4, "stop", stop_reason="X")


def test_logprobs_are_released_with_the_text_of_their_tokens(
    model_tokenizer: ModelTokenizer,
) -> None:
    """They are held back with a possible stop string and dropped with a matched one."""
    ids = model_tokenizer.encode("aXYXYZ")
    request = GenerationRequest(
        (5,),
        9,
        sampling_params=SamplingParams(n_logprobs=0),
        stop_conditions=StopConditions(stop_strings=("XYZ",)),
    )
    logits_state = LogitsState(request, [])
    assert logits_state.logprob_queue is not None
    for token in ids:
        logits_state.logprob_queue.append(SampledLogprob(token, -1.0))
    processor = SequenceOutputProcessor(
        request,
        detokenizer=model_tokenizer.new_detokenizer(),
        stop_token_ids=(),
        logits_state=logits_state,
    )
    outputs = [processor.process_tokens([token]) for token in ids]
    logprobs = [[(offset, entry.token) for offset, entry in each.logprobs] for each in outputs]
    assert [output.text for output in outputs] == ["a", "", "", "XY", "", ""]
    assert logprobs == [[(0, ids[0])], [], [], [(1, ids[1]), (2, ids[2])], [], []]


def test_outputs_carry_the_tokens_up_to_the_end(model_tokenizer: ModelTokenizer) -> None:
    processor = _output_processor(model_tokenizer, _request())
    tokens = model_tokenizer.encode("ab")
    assert processor.process_tokens(tokens).token_ids == tuple(tokens)
    assert processor.process_tokens([EOS_TOKEN_ID, 9]).token_ids == (EOS_TOKEN_ID,)


def test_token_that_ends_a_grammar_is_no_text(model_tokenizer: ModelTokenizer) -> None:
    """A grammar ends by the tokenizer's own token where the model has no EOS token."""
    vocabulary = model_tokenizer.new_vocabulary(n_scores=340, eos_token_ids=[EOS_TOKEN_ID])
    grammar = compile_grammar(GrammarSource("regex", "a+"), vocabulary)
    request = GenerationRequest((5,), 9, sampling_params=SamplingParams(grammar=grammar))
    logits_state = LogitsState(request, [])
    processor = SequenceOutputProcessor(
        request,
        detokenizer=model_tokenizer.new_detokenizer(include_special_tokens=True),
        stop_token_ids=(),
        logits_state=logits_state,
    )
    tokens = [*model_tokenizer.encode("a", add_special_tokens=False), EOS_TOKEN_ID]
    outputs = []
    for token in tokens:
        logits_state.accept_token(token)
        outputs.append(processor.process_tokens([token]))
    assert [(output.text, output.finish_reason) for output in outputs] == [
        ("a", None),
        ("", "stop"),
    ]
