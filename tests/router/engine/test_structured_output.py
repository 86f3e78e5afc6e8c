"""Grammar-constrained sampling with random scores yields texts that the grammar accepts."""

import asyncio
import json
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_engine import run_here

from faasmoe_router.engine import structured_output
from faasmoe_router.engine.structured_output import (
    CompiledGrammar,
    GrammarCompiler,
    GrammarKind,
    GrammarSource,
    RowConstraint,
    apply_grammar_bitmask,
    compile_grammar,
)
from faasmoe_router.engine.tokenizer import ModelTokenizer, Vocabulary
from faasmoe_router.errors import GrammarError

EOS = 0
MAX_TOKENS = 400
N_SCORES = 340  # exceeds the tokenizer's number of tokens, as in real models
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
def vocabulary(model_tokenizer: ModelTokenizer) -> Vocabulary:
    return model_tokenizer.new_vocabulary(n_scores=N_SCORES, eos_token_ids=[EOS])


def _source(kind: GrammarKind, grammar: Any) -> GrammarSource:
    return GrammarSource(kind, grammar if isinstance(grammar, str) else json.dumps(grammar))


def _generate(grammar: CompiledGrammar, model_tokenizer: ModelTokenizer, *, seed: int) -> str:
    """Generate a text from random scores under a grammar."""
    matcher = grammar.new_matcher()
    generator = torch.Generator().manual_seed(seed)
    tokens: list[int] = []
    while not matcher.is_terminated and len(tokens) < MAX_TOKENS:
        scores = torch.randn(2, N_SCORES, generator=generator)
        untouched = scores[0].clone()
        apply_grammar_bitmask(scores, [RowConstraint(1, matcher)])
        assert scores[0].equal(untouched)
        token = int(scores[1].argmax())
        matcher.accept_token(token)
        assert matcher.error is None
        if token != EOS:
            tokens.append(token)
    assert matcher.is_terminated, "the text did not end"
    return model_tokenizer.decode(tokens, include_special_tokens=True)


def _matches_schema(text: str) -> bool:
    value = json.loads(text)
    sizes = value["sizes"]
    assert value.keys() == {"colour", "sizes"}
    assert value["colour"] in ("red", "blue")
    return len(sizes) <= 3 and all(isinstance(size, int) for size in sizes)


@pytest.mark.parametrize(
    ("kind", "grammar", "accepts"),
    [
        pytest.param("json_schema", SCHEMA, _matches_schema, id="json_schema"),
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
            "grammar", 'start: "x" | "y" "z"', ["x", "yz"].__contains__, id="undeclared-lark"
        ),
        pytest.param("lark", "start: /[0-9]{3}/", re.compile("[0-9]{3}").fullmatch, id="lark"),
    ],
)
def test_generated_text_matches_its_grammar(
    kind: GrammarKind,
    grammar: Any,
    accepts: Callable[[str], object],
    vocabulary: Vocabulary,
    model_tokenizer: ModelTokenizer,
) -> None:
    compiled = compile_grammar(_source(kind, grammar), vocabulary)
    texts = [_generate(compiled, model_tokenizer, seed=seed) for seed in range(8)]
    assert all(map(accepts, texts)), texts
    assert len(set(texts)) > 1


@pytest.mark.parametrize(
    ("kind", "grammar", "message"),
    [
        pytest.param("json_schema", "{", "EOF", id="invalid-json"),
        pytest.param("json_schema", {"type": "thing"}, "type", id="unknown-type"),
        pytest.param("json_schema", {"not": {"type": "string"}}, "not", id="unsupported-keyword"),
        pytest.param(
            "json_schema", {"$ref": "https://a.example/b"}, "not present", id="remote-ref"
        ),
        pytest.param("json_schema", "false", "object", id="false-schema"),
        pytest.param("regex", "(", "regex", id="regex"),
        pytest.param("grammar", "", "No .root. rule", id="empty"),
        pytest.param("grammar", "root ::= lost", "lost", id="unknown-rule"),
        pytest.param("lark", 'start: "\\x"', "x", id="lark"),
    ],
)
def test_rejects_invalid_grammars(
    kind: GrammarKind, grammar: Any, message: str, vocabulary: Vocabulary
) -> None:
    with pytest.raises(GrammarError, match=message):
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
def test_pathological_grammar_takes_bounded_time(name: str, vocabulary: Vocabulary) -> None:
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
        apply_grammar_bitmask(scores, [RowConstraint(0, matcher)])
        matcher.accept_token(int(scores.argmax()))
    # The limits bound work, not time; this is ten times the time that they amount to.
    assert time.thread_time() - start_s < 10


def test_matcher_reports_an_exceeded_time_budget(
    vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    matcher = compile_grammar(_source("regex", "a*"), vocabulary).new_matcher()
    monkeypatch.setattr(structured_output, "INITIAL_TIME_BUDGET_S", 0.0)
    monkeypatch.setattr(structured_output, "STEP_TIME_BUDGET_S", 0.0)
    apply_grammar_bitmask(torch.zeros(1, N_SCORES), [RowConstraint(0, matcher)])
    assert "ms per token" in str(matcher.error)


def test_forbidden_token_is_an_error_and_does_not_terminate(vocabulary: Vocabulary) -> None:
    matcher = compile_grammar(_source("choice", ["a"]), vocabulary).new_matcher()
    matcher.accept_token(EOS)
    assert matcher.error is not None
    assert not matcher.is_terminated


def test_compiler_caches_grammars_least_recently_used(
    vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(structured_output, "MAX_CACHED_GRAMMARS", 2)
    sources = [_source("choice", [name]) for name in "abc"]

    async def scenario() -> None:
        compiler = GrammarCompiler(vocabulary)
        first = await compiler.compile(sources[0], run_here)
        second = await compiler.compile(sources[1], run_here)
        assert await compiler.compile(sources[0], run_here) is first
        await compiler.compile(sources[2], run_here)  # evicts the second, the least recently used
        assert await compiler.compile(sources[0], run_here) is first
        assert await compiler.compile(sources[1], run_here) is not second

    asyncio.run(scenario())


def test_rejects_large_grammars_before_compiling(vocabulary: Vocabulary) -> None:
    async def scenario() -> None:
        source = GrammarSource("regex", "a" * (structured_output.MAX_GRAMMAR_BYTES + 1))
        await GrammarCompiler(vocabulary).compile(source, run_here)

    with pytest.raises(GrammarError, match="limit of 65536"):
        asyncio.run(scenario())


def test_a_compilation_that_takes_too_long_is_an_error(vocabulary: Vocabulary) -> None:
    async def time_out(work: Callable[[], CompiledGrammar], *, timeout_s: float) -> CompiledGrammar:
        raise TimeoutError

    with pytest.raises(GrammarError, match="not compiled within 5 s"):
        asyncio.run(GrammarCompiler(vocabulary).compile(_source("choice", ["a"]), time_out))
