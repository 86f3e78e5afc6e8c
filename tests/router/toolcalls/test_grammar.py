"""What is held to the grammar of calls is read as calls, by each form's own parser."""

import json
from typing import Any

import pytest
import torch

from faasmoe_router.engine.structured_output import (
    JSON_OPTIONS,
    GrammarSource,
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


def _write(codec: ModelTokenizer, source: str, seed: int) -> str:
    vocabulary = codec.new_vocabulary(n_scores=N_SCORES, eos_token_ids=[0])
    matcher = compile_grammar(GrammarSource("lark", source), vocabulary).new_matcher()
    generator = torch.Generator().manual_seed(seed)
    tokens: list[int] = []
    while not matcher.is_terminated and len(tokens) < 4000:
        scores = torch.randn(1, N_SCORES, generator=generator)
        apply_grammar_bitmask(scores, [(0, matcher)])
        tokens.append(int(scores.argmax()))
        matcher.accept_token(tokens[-1])
    assert matcher.is_terminated
    return codec.decode([token for token in tokens if token], include_special_tokens=True)


def _grammar(form: ToolCallFormat, **asked: Any) -> str:
    many = asked.pop("many", True)
    return tool_call_grammar(
        TOOLS,
        form,
        encode_marker=json.dumps,
        json_options=dict(JSON_OPTIONS),
        parallel=many,
        **asked,
    )


@pytest.mark.parametrize("form", [HERMES, MISTRAL, LLAMA], ids=lambda form: form.name)
@pytest.mark.parametrize("many", [False, True])
def test_every_text_is_calls_and_nothing_else(
    form: ToolCallFormat, many: bool, codec: ModelTokenizer
) -> None:
    for seed in range(4):
        text = _write(codec, _grammar(form, many=many), seed)
        parser = ToolCallParser(form, {"weather", "clock"})
        pieces = [*parser.feed(text), *parser.flush()]
        assert not [piece for piece in pieces if isinstance(piece, ContentDelta)], text
        names = [piece.name for piece in pieces if isinstance(piece, ToolCallStart)]
        assert set(names) <= {"weather", "clock"}
        assert 1 <= len(names) <= (MAX_TOOL_CALLS if many else 1)


def test_json_may_come_instead_of_calls(codec: ModelTokenizer) -> None:
    grammar = _grammar(HERMES, many=False, alternative_schema='{"const": 7}')
    texts = {_write(codec, grammar, seed)[:1] for seed in range(12)}
    assert texts == {"7", "<"}


def test_a_special_mark_is_written_as_its_token(codec: ModelTokenizer) -> None:
    token = codec.special_token_id("<|im_start|>")
    assert token is not None
    assert codec.special_token_id("the") is None
    marked = tool_call_grammar(
        TOOLS,
        HERMES,
        encode_marker=lambda text: (
            f"<[{token}]>" if text == HERMES.start_marker else json.dumps(text)
        ),
        json_options=dict(JSON_OPTIONS),
        parallel=False,
    )
    assert _write(codec, marked, seed=1).startswith("<|im_start|>\n{")
