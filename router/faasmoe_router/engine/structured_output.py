"""Structured output: text constrained to a JSON schema, regular expression, choice or grammar.

llguidance computes the bitmask of allowed tokens for each step. Grammars are lazy: compiling one
takes about a millisecond, and its states are built when they are reached. A client's grammar is
bounded in size, in work per step and in total time per text; exceeding a bound fails only that
request.
"""

import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from
from torch import Tensor

from faasmoe_router.engine.tokenizer import Vocabulary
from faasmoe_router.errors import GrammarError

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

GrammarKind = Literal["json_schema", "lenient_json_schema", "regex", "choice", "grammar", "lark"]

MAX_GRAMMAR_BYTES = 64 << 10
MAX_CACHED_GRAMMARS = 64
MAX_ERROR_LENGTH = 1800
COMPILE_TIMEOUT_S = 5.0
# CPU time for all steps of one text: a fixed allowance plus an allowance for each step.
INITIAL_TIME_BUDGET_S, STEP_TIME_BUDGET_S = 0.5, 0.005
# Bounded whitespace between JSON tokens: without a bound, a small model may never finish.
JSON_OPTIONS: "JsonCompileOptions" = {"whitespace_pattern": r"[ \n\t]{0,16}"}
# As JSON_OPTIONS, but keywords that llguidance does not know are ignored.
LENIENT_JSON_OPTIONS: "JsonCompileOptions" = {**JSON_OPTIONS, "lenient": True}
_PARSER_LIMITS = LLParserLimits(
    max_items_in_row=1000,
    initial_lexer_fuel=400_000,
    step_lexer_fuel=50_000,
    step_max_items=5_000,
    max_lexer_states=10_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)


@dataclass(frozen=True, slots=True)
class GrammarSource:
    """A grammar as the client wrote it.

    Attributes:
        kind: its language: "json_schema" is a JSON schema, "lenient_json_schema" one whose unknown
            keywords are ignored, "regex" a regular expression, "choice" a JSON list of strings,
            "grammar" GBNF or Lark (detected), "lark" Lark.
        text: the source text.
    """

    kind: GrammarKind
    text: str


class GrammarMatcher:
    """The position of one sequence in its grammar; used on the engine's thread only.

    Attributes:
        n_bitmask_words: number of 32-bit words in a bitmask of one bit per token.
        is_terminated: whether the text is complete and no further token is allowed.
    """

    def __init__(self, state: LLMatcher, n_bitmask_words: int) -> None:
        self.n_bitmask_words = n_bitmask_words
        self.is_terminated = False
        self._state = state
        self._spent_s = 0.0
        self._n_steps = 0

    @property
    def error(self) -> str | None:
        """Why the text cannot continue: the matcher failed or exceeded its time; else None."""
        if self._state.is_error():
            return f"the grammar rejected the text or is too complex: {self._error_text()}"
        if self._spent_s > INITIAL_TIME_BUDGET_S + STEP_TIME_BUDGET_S * self._n_steps:
            return f"the grammar takes {1000 * self._spent_s / self._n_steps:.0f} ms per token"
        return None

    def fill_bitmask(self, bitmask: Tensor) -> None:
        """Write the bitmask of allowed next tokens into `bitmask`, [W], int32, on the CPU."""
        start_s = time.thread_time()
        self._state.unsafe_compute_mask_ptr(
            bitmask.data_ptr(), bitmask.numel() * bitmask.element_size()
        )
        self._spent_s += time.thread_time() - start_s
        self._n_steps += 1

    def accept_token(self, token: int) -> None:
        """Advance by the sampled token."""
        start_s = time.thread_time()
        self._state.consume_token(token)
        self._spent_s += time.thread_time() - start_s
        self.is_terminated = self._state.is_stopped() and not self._state.is_error()

    def _error_text(self) -> str:
        return str(self._state.get_error()).partition("\n")[0][:200]


class CompiledGrammar:
    """A compiled grammar, shared by any number of sequences.

    Attributes:
        stop_token_ids: tokens that end the text where the grammar allows it to end.
    """

    def __init__(self, state: LLMatcher, ll_tokenizer: LLTokenizer) -> None:
        self.stop_token_ids: tuple[int, ...] = tuple(ll_tokenizer.eos_tokens)
        self._state = state
        self._n_bitmask_words = -(-ll_tokenizer.vocab_size // 32)

    def new_matcher(self) -> GrammarMatcher:
        """Return a matcher at the start of the grammar."""
        return GrammarMatcher(self._state.deep_copy(), self._n_bitmask_words)

    def check_step_time(self) -> None:
        """Compute the first step, the most expensive; raises GrammarError if it takes too long."""
        matcher = self.new_matcher()
        matcher.fill_bitmask(torch.zeros(self._n_bitmask_words, dtype=torch.int32))
        if (error := matcher.error) is not None:
            raise GrammarError(error)


class CompileRunner(Protocol):
    """Runs compilations on threads; bounds how many run at once."""

    def __call__(
        self, work: Callable[[], CompiledGrammar], *, timeout_s: float
    ) -> Awaitable[CompiledGrammar]:
        """Return the result of `work`; raises TimeoutError if it runs longer than that."""


class GrammarCompiler:
    """Compiles grammars, with an LRU cache of results; bound to one event loop."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._cache: OrderedDict[GrammarSource, CompiledGrammar] = OrderedDict()

    async def compile(self, source: GrammarSource, run: CompileRunner) -> CompiledGrammar:
        """Return the compiled grammar, from the cache if possible.

        Args:
            source: the grammar.
            run: runs the compilation.

        Raises:
            GrammarError: the source is invalid, unsupported, too large or too expensive.
        """
        if (cached := self._cache.get(source)) is not None:
            self._cache.move_to_end(source)
            return cached
        size_bytes = len(source.text.encode())
        if size_bytes > MAX_GRAMMAR_BYTES:
            raise GrammarError(
                f"the grammar has {size_bytes} bytes, more than the limit of {MAX_GRAMMAR_BYTES}"
            )
        try:
            grammar = await run(
                lambda: compile_grammar(source, self._vocabulary), timeout_s=COMPILE_TIMEOUT_S
            )
        except TimeoutError:
            raise GrammarError(
                f"the grammar was not compiled within {COMPILE_TIMEOUT_S:.0f} s"
            ) from None
        self._cache[source] = grammar
        while len(self._cache) > MAX_CACHED_GRAMMARS:
            self._cache.popitem(last=False)
        return grammar


def compile_grammar(source: GrammarSource, vocabulary: Vocabulary) -> CompiledGrammar:
    """Compile a grammar; takes milliseconds, or seconds for the worst case within the limits.

    Raises:
        GrammarError: the source is invalid, unsupported or too expensive, or llguidance cannot use
            the model's tokenizer.
    """
    ll_tokenizer = vocabulary.ll_tokenizer
    try:
        state = LLMatcher(ll_tokenizer, _to_llguidance(source), log_level=0, limits=_PARSER_LIMITS)
    except (ValueError, RecursionError) as error:
        raise GrammarError(_bounded(str(error))) from error
    if state.is_error():
        raise GrammarError(_bounded(str(state.get_error())))
    grammar = CompiledGrammar(state, ll_tokenizer)
    grammar.check_step_time()
    return grammar


def _bounded(message: str) -> str:
    """Return a message, without its middle if it is long: it quotes the source in full."""
    message, half = message.strip(), MAX_ERROR_LENGTH // 2
    return message if len(message) <= 2 * half else f"{message[:half]} ... {message[-half:]}"


def _to_llguidance(source: GrammarSource) -> str:
    if source.kind == "json_schema":
        return str(LLMatcher.grammar_from_json_schema(source.text, overrides=JSON_OPTIONS))
    if source.kind == "lenient_json_schema":
        return str(LLMatcher.grammar_from_json_schema(source.text, overrides=LENIENT_JSON_OPTIONS))
    return str(grammar_from(source.kind, source.text))


@dataclass(frozen=True, slots=True)
class RowConstraint:
    """The grammar that constrains one row of the scores.

    Attributes:
        row: row of the scores.
        matcher: position in the grammar.
        free_token: a token that is allowed beside those of the grammar; None for none.
    """

    row: int
    matcher: GrammarMatcher
    free_token: int | None = None


def apply_grammar_bitmask(scores: Tensor, constraints: Sequence[RowConstraint]) -> None:
    """Set the scores of tokens that the grammars forbid to minus infinity, in place.

    Args:
        scores: [N, V].
        constraints: the grammars of the constrained rows.
    """
    if not constraints:
        return
    n_vocab, n_words = scores.shape[-1], constraints[0].matcher.n_bitmask_words
    bitmask = torch.zeros(len(constraints), n_words, dtype=torch.int32)  # [R, W]
    for packed, constraint in zip(bitmask, constraints, strict=True):
        constraint.matcher.fill_bitmask(packed)
    forbidden = numpy.unpackbits(
        (~bitmask).numpy().view(numpy.uint8), axis=-1, count=n_vocab, bitorder="little"
    )  # [R, V], uint8, 1 where forbidden
    for mask, constraint in zip(forbidden, constraints, strict=True):
        if constraint.free_token is not None:
            mask[constraint.free_token] = 0
    masks = torch.from_numpy(forbidden).view(torch.bool).to(scores.device)  # [R, V]
    for mask, constraint in zip(masks, constraints, strict=True):
        scores[constraint.row].masked_fill_(mask, -torch.inf)
