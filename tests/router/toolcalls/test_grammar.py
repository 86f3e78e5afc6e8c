"""Texts generated under the tool call grammar are parsed as calls, for every format."""

import json

import pytest
import torch

from faasmoe_router.engine.structured_output import (
    JSON_OPTIONS,
    GrammarSource,
    RowConstraint,
    apply_grammar_bitmask,
    compile_grammar,
)
from faasmoe_router.engine.tokenizer import ModelTokenizer
from faasmoe_router.toolcalls.formats import HERMES, LLAMA, MISTRAL, ToolCallFormat
from faasmoe_router.toolcalls.grammar import MAX_TOOL_CALLS, ToolSpec, tool_call_grammar
from faasmoe_router.toolcalls.parser import ContentDelta, ToolCallParser, ToolCallStart

N_SCORES = 320
TOOLS = [
    ToolSpec("weather", {"properties": {"city": {"enum": ["Rome"]}}, "required": ["city"]}),
    ToolSpec("clock", {"type": "object", "additionalProperties": False}),
]


def _generate(model_tokenizer: ModelTokenizer, source: str, seed: int) -> str:
    vocabulary = model_tokenizer.new_vocabulary(n_scores=N_SCORES, eos_token_ids=[0])
    matcher = compile_grammar(GrammarSource("lark", source), vocabulary).new_matcher()
    generator = torch.Generator().manual_seed(seed)
    tokens: list[int] = []
    while not matcher.is_terminated and len(tokens) < 4000:
        scores = torch.randn(1, N_SCORES, generator=generator)
        apply_grammar_bitmask(scores, [RowConstraint(0, matcher)])
        tokens.append(int(scores.argmax()))
        matcher.accept_token(tokens[-1])
    assert matcher.is_terminated
    return model_tokenizer.decode([token for token in tokens if token], include_special_tokens=True)


def _grammar(
    call_format: ToolCallFormat, *, parallel: bool, alternative_schema: str | None = None
) -> str:
    return tool_call_grammar(
        TOOLS,
        call_format,
        encode_marker=json.dumps,
        json_options=dict(JSON_OPTIONS),
        parallel=parallel,
        alternative_schema=alternative_schema,
    )


@pytest.mark.parametrize("call_format", [HERMES, MISTRAL, LLAMA], ids=lambda each: each.name)
@pytest.mark.parametrize("parallel", [False, True])
def test_generated_text_consists_of_calls_only(
    call_format: ToolCallFormat, parallel: bool, model_tokenizer: ModelTokenizer
) -> None:
    for seed in range(4):
        text = _generate(model_tokenizer, _grammar(call_format, parallel=parallel), seed)
        parser = ToolCallParser(call_format, {"weather", "clock"})
        events = [*parser.feed(text), *parser.flush()]
        assert not [event for event in events if isinstance(event, ContentDelta)], text
        names = [event.name for event in events if isinstance(event, ToolCallStart)]
        assert set(names) <= {"weather", "clock"}
        assert 1 <= len(names) <= (MAX_TOOL_CALLS if parallel else 1)


def test_alternative_schema_allows_json_in_place_of_calls(model_tokenizer: ModelTokenizer) -> None:
    grammar = _grammar(HERMES, parallel=False, alternative_schema='{"const": 7}')
    first_characters = {_generate(model_tokenizer, grammar, seed)[:1] for seed in range(12)}
    assert first_characters == {"7", "<"}


def test_marker_can_be_encoded_as_special_token(model_tokenizer: ModelTokenizer) -> None:
    token = model_tokenizer.special_token_id("<|im_start|>")
    assert token is not None
    assert model_tokenizer.special_token_id("the") is None
    grammar = tool_call_grammar(
        TOOLS,
        HERMES,
        encode_marker=lambda text: (
            f"<[{token}]>" if text == HERMES.start_marker else json.dumps(text)
        ),
        json_options=dict(JSON_OPTIONS),
        parallel=False,
    )
    assert _generate(model_tokenizer, grammar, seed=1).startswith("<|im_start|>\n{")
