"""What is held to the grammar of calls is read as calls, by each form's own parser."""

import json
from typing import Any

import pytest
import torch

from faasmoe_router.engine.grammar import JSON_OPTIONS, GrammarSource, compile_grammar, constrain
from faasmoe_router.engine.text import TextCodec
from faasmoe_router.toolcalls.forms import HERMES, LLAMA, MISTRAL, CallForm
from faasmoe_router.toolcalls.grammar import MAX_CALLS, Tool, calls_grammar
from faasmoe_router.toolcalls.parser import CallBegun, CallParser, Content

N_SCORES = 320
TOOLS = [
    Tool("weather", {"properties": {"city": {"enum": ["Rome"]}}, "required": ["city"]}),
    Tool("clock", {"type": "object", "additionalProperties": False}),
]


def _write(codec: TextCodec, source: str, seed: int) -> str:
    vocabulary = codec.vocabulary(n_tokens=N_SCORES, eos_ids=[0])
    matcher = compile_grammar(GrammarSource("lark", source), vocabulary).matcher()
    generator = torch.Generator().manual_seed(seed)
    tokens: list[int] = []
    while not matcher.ended and len(tokens) < 4000:
        scores = torch.randn(1, N_SCORES, generator=generator)
        constrain(scores, [(0, matcher)])
        tokens.append(int(scores.argmax()))
        matcher.accept(tokens[-1])
    assert matcher.ended
    return codec.decode([token for token in tokens if token], special=True)


def _grammar(form: CallForm, **asked: Any) -> str:
    many = asked.pop("many", True)
    return calls_grammar(
        TOOLS, form, mark=json.dumps, json_options=dict(JSON_OPTIONS), many=many, **asked
    )


@pytest.mark.parametrize("form", [HERMES, MISTRAL, LLAMA], ids=lambda form: form.name)
@pytest.mark.parametrize("many", [False, True])
def test_every_text_is_calls_and_nothing_else(form: CallForm, many: bool, codec: TextCodec) -> None:
    for seed in range(4):
        text = _write(codec, _grammar(form, many=many), seed)
        parser = CallParser(form, {"weather", "clock"})
        pieces = [*parser.feed(text), *parser.flush()]
        assert not [piece for piece in pieces if isinstance(piece, Content)], text
        names = [piece.name for piece in pieces if isinstance(piece, CallBegun)]
        assert set(names) <= {"weather", "clock"}
        assert 1 <= len(names) <= (MAX_CALLS if many else 1)


def test_json_may_come_instead_of_calls(codec: TextCodec) -> None:
    grammar = _grammar(HERMES, many=False, instead='{"const": 7}')
    texts = {_write(codec, grammar, seed)[:1] for seed in range(12)}
    assert texts == {"7", "<"}


def test_a_special_mark_is_written_as_its_token(codec: TextCodec) -> None:
    token = codec.special_id("<|im_start|>")
    assert token is not None
    assert codec.special_id("the") is None
    marked = calls_grammar(
        TOOLS,
        HERMES,
        mark=lambda text: f"<[{token}]>" if text == HERMES.begin else json.dumps(text),
        json_options=dict(JSON_OPTIONS),
        many=False,
    )
    assert _write(codec, marked, seed=1).startswith("<|im_start|>\n{")
