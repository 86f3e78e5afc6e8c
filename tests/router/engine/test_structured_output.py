"""Texts that are held to grammars, a random token at a time: what comes out is in the grammar."""

import asyncio
import json
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from faasmoe_router.engine import structured_output as grammar_module
from faasmoe_router.engine.structured_output import (
    CompiledGrammar,
    GrammarCompiler,
    GrammarKind,
    GrammarSource,
    apply_grammar_bitmask,
    compile_grammar,
)
from faasmoe_router.engine.tokenizer import ModelTokenizer, Vocabulary
from faasmoe_router.errors import GrammarError

END = 0
N_SCORES = 340  # more than the tokenizer has tokens, as models do
SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "blue"]},
        "sizes": {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
    },
    "required": ["colour", "sizes"],
    "additionalProperties": False,
}


@pytest.fixture(scope="session")
def vocabulary(codec: ModelTokenizer) -> Vocabulary:
    return codec.new_vocabulary(n_scores=N_SCORES, eos_token_ids=[END])


def _source(kind: GrammarKind, grammar: Any) -> GrammarSource:
    return GrammarSource(kind, grammar if isinstance(grammar, str) else json.dumps(grammar))


def _write(grammar: CompiledGrammar, codec: ModelTokenizer, *, seed: int, most: int = 400) -> str:
    """Let random scores write a text."""
    matcher = grammar.new_matcher()
    generator = torch.Generator().manual_seed(seed)
    tokens: list[int] = []
    while not matcher.is_terminated and len(tokens) < most:
        scores = torch.randn(2, N_SCORES, generator=generator)
        untouched = scores[0].clone()
        apply_grammar_bitmask(scores, [(1, matcher)])
        assert scores[0].equal(untouched)
        token = int(scores[1].argmax())
        matcher.accept_token(token)
        assert matcher.error is None
        if token != END:
            tokens.append(token)
    assert matcher.is_terminated, "the text did not end"
    return codec.decode(tokens, include_special_tokens=True)


def _is_in_schema(text: str) -> bool:
    said = json.loads(text)
    sizes = said["sizes"]
    assert said.keys() == {"colour", "sizes"}
    assert said["colour"] in ("red", "blue")
    return len(sizes) <= 3 and all(isinstance(size, int) for size in sizes)


@pytest.mark.parametrize(
    ("kind", "grammar", "is_in"),
    [
        pytest.param("json_schema", SCHEMA, _is_in_schema, id="json_schema"),
        pytest.param(
            "regex", "[a-c]{2,6}[0-9]", re.compile("[a-c]{2,6}[0-9]").fullmatch, id="regex"
        ),
        pytest.param(
            "choice", ["yes", "no", "日本"], ["yes", "no", "日本"].__contains__, id="choice"
        ),
        pytest.param(
            "grammar", 'root ::= "a" root "b" | "c"', re.compile("a*cb*").fullmatch, id="gbnf"
        ),
        pytest.param(
            "grammar", 'start: "x" | "y" "z"', ["x", "yz"].__contains__, id="lark-without-its-name"
        ),
        pytest.param("lark", "start: /[0-9]{3}/", re.compile("[0-9]{3}").fullmatch, id="lark"),
    ],
)
def test_a_text_is_held_to_its_grammar(
    kind: GrammarKind,
    grammar: Any,
    is_in: Callable[[str], object],
    vocabulary: Vocabulary,
    codec: ModelTokenizer,
) -> None:
    compiled = compile_grammar(_source(kind, grammar), vocabulary)
    texts = [_write(compiled, codec, seed=seed) for seed in range(8)]
    assert all(map(is_in, texts)), texts
    assert len(set(texts)) > 1


@pytest.mark.parametrize(
    ("kind", "grammar", "why"),
    [
        pytest.param("json_schema", "{", "EOF", id="no-json"),
        pytest.param("json_schema", {"type": "thing"}, "type", id="unknown-type"),
        pytest.param("json_schema", {"not": {"type": "string"}}, "not", id="keyword"),
        pytest.param("json_schema", {"$ref": "https://a.example/b"}, "not present", id="far-ref"),
        pytest.param("json_schema", "false", "object", id="nothing-is-right"),
        pytest.param("regex", "(", "regex", id="regex"),
        pytest.param("grammar", "", "No .root. rule", id="empty"),
        pytest.param("grammar", "root ::= lost", "lost", id="unknown-rule"),
        pytest.param("lark", 'start: "\\x"', "x", id="lark"),
    ],
)
def test_what_is_no_grammar_is_refused(
    kind: GrammarKind, grammar: Any, why: str, vocabulary: Vocabulary
) -> None:
    with pytest.raises(GrammarError, match=why):
        compile_grammar(_source(kind, grammar), vocabulary)


def _nested(n_levels: int, keyword: str) -> str:
    return f'{{"{keyword}":[' * n_levels + "true" + "]}" * n_levels


EXPLOSIVE = {
    "regex-powers": ("regex", "((a{1000}){1000}){1000}"),
    "regex-optionals": ("regex", "(?:a?){5000}a{5000}"),
    "regex-states": ("regex", "(a|b)*a(a|b){60}"),
    "regex-deep": ("regex", "(" * 9000 + "a" + ")" * 9000),
    "regex-alternatives": ("regex", "|".join(f"w{i}x.*" for i in range(3000)) + "z"),
    "schema-deep": ("json_schema", _nested(5000, "anyOf")),
    "schema-conjunction": ("json_schema", _nested(100, "allOf")),
    "schema-products": (
        "json_schema",
        {
            "allOf": [
                {"oneOf": [{"properties": {f"p{i}{j}": {"type": "null"}}} for j in range(12)]}
                for i in range(8)
            ]
        },
    ),
    "schema-doubling": (
        "json_schema",
        {
            "$defs": {
                **{f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(60)},
                "d60": {"type": "string"},
            },
            "$ref": "#/$defs/d0",
        },
    ),
    "schema-itself": ("json_schema", {"$ref": "#"}),
    "schema-long": ("json_schema", {"type": "string", "minLength": 10**9}),
    "schema-wide": (
        "json_schema",
        {"properties": {f"p{i}": {"type": "string"} for i in range(1500)}},
    ),
    "grammar-ambiguous": ("grammar", 'start: start start | "a" start | "a"'),
    "grammar-empty-loops": (
        "grammar",
        'start: a a a a a a a a\na: "x"* | a a | b\nb: a b | "x"?',
    ),
    "grammar-deep": ("grammar", "root ::= " + "(" * 5000 + '"a"' + ")" * 5000),
}


@pytest.mark.parametrize("name", EXPLOSIVE)
def test_a_grammar_that_explodes_takes_a_bounded_time(name: str, vocabulary: Vocabulary) -> None:
    kind, grammar = EXPLOSIVE[name]
    source = GrammarSource(kind, grammar if isinstance(grammar, str) else json.dumps(grammar))  # type: ignore[arg-type]
    start_s = time.thread_time()
    try:
        matcher = compile_grammar(source, vocabulary).new_matcher()
    except GrammarError:
        matcher = None
    generator = torch.Generator().manual_seed(0)
    for _ in range(64):
        if matcher is None or matcher.is_terminated or matcher.error is not None:
            break
        scores = torch.randn(1, N_SCORES, generator=generator)
        apply_grammar_bitmask(scores, [(0, matcher)])
        matcher.accept_token(int(scores.argmax()))
    # The limits are of work, not of time: this is ten times what they come to.
    assert time.thread_time() - start_s < 10


def test_a_text_whose_grammar_costs_too_much_is_told_so(
    vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    matcher = compile_grammar(_source("regex", "a*"), vocabulary).new_matcher()
    monkeypatch.setattr(grammar_module, "INITIAL_TIME_BUDGET_S", 0.0)
    monkeypatch.setattr(grammar_module, "STEP_TIME_BUDGET_S", 0.0)
    apply_grammar_bitmask(torch.zeros(1, N_SCORES), [(0, matcher)])
    assert "for each token" in str(matcher.error)


def test_a_token_outside_the_grammar_is_an_error_and_not_an_end(vocabulary: Vocabulary) -> None:
    matcher = compile_grammar(_source("choice", ["a"]), vocabulary).new_matcher()
    matcher.accept_token(END)
    assert matcher.error is not None
    assert not matcher.is_terminated


def test_a_grammar_is_compiled_once_and_the_oldest_are_forgotten(
    vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_module, "MAX_CACHED_GRAMMARS", 2)
    sources = [_source("choice", [name]) for name in "abc"]

    async def compile_all() -> None:
        compiler = GrammarCompiler(vocabulary)
        first = await compiler.compile(sources[0])
        second = await compiler.compile(sources[1])
        assert await compiler.compile(sources[0]) is first
        await compiler.compile(sources[2])  # the second is the one that was used longest ago
        assert await compiler.compile(sources[0]) is first
        assert await compiler.compile(sources[1]) is not second

    asyncio.run(compile_all())


def test_a_large_grammar_is_refused_unread(vocabulary: Vocabulary) -> None:
    async def compile_large() -> None:
        source = GrammarSource("regex", "a" * (grammar_module.MAX_GRAMMAR_BYTES + 1))
        await GrammarCompiler(vocabulary).compile(source)

    with pytest.raises(GrammarError, match="at most 65536 are read"):
        asyncio.run(compile_large())


def test_one_that_takes_too_long_is_refused_and_keeps_its_place_until_it_is_done(
    vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def compile_slowly() -> None:
        hold = asyncio.Event()
        loop = asyncio.get_running_loop()
        compiler = GrammarCompiler(vocabulary)

        def slow(source: GrammarSource, vocabulary: Vocabulary) -> CompiledGrammar:
            asyncio.run_coroutine_threadsafe(hold.wait(), loop).result(20)
            return compile_grammar(source, vocabulary)

        monkeypatch.setattr(grammar_module, "COMPILE_TIMEOUT_S", 0.05)
        monkeypatch.setattr(grammar_module, "compile_grammar", slow)
        with pytest.raises(GrammarError, match="not compiled within"):
            await compiler.compile(_source("choice", ["a"]))
        assert compiler._compile_semaphore.locked()
        monkeypatch.setattr(grammar_module, "compile_grammar", compile_grammar)
        monkeypatch.setattr(grammar_module, "COMPILE_TIMEOUT_S", 20.0)
        hold.set()
        assert await compiler.compile(_source("choice", ["b"]))

    asyncio.run(compile_slowly())
