"""Grammars: text that is held to a JSON schema, a regular expression, a list or a grammar.

llguidance computes for each step which tokens may come next. A grammar is lazy: it costs a
millisecond to compile, and its states are found as they are met. What a client writes is bounded in
size, in the work of each step and in the time that a text may cost in all; beyond that its request
ends with an error, and nobody else's.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from
from torch import Tensor

from faasmoe_router.engine.tokenizer import Vocabulary
from faasmoe_router.errors import GrammarError

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

GrammarKind = Literal["json_schema", "regex", "choice", "grammar", "lark"]

MAX_GRAMMAR_BYTES = 64 << 10
MAX_CACHED_GRAMMARS = 64
MAX_CONCURRENT_COMPILATIONS = 1  # at a time: a hard one must not take every core from the engine
COMPILE_TIMEOUT_S = 5.0
# What all the steps of one text may take of a core: some for its first ones, a little for each.
INITIAL_TIME_BUDGET_S, STEP_TIME_BUDGET_S = 0.5, 0.005
# Whitespace between JSON's tokens has a bound: without one a small model may never end.
JSON_OPTIONS: "JsonCompileOptions" = {"whitespace_pattern": r"[ \n\t]{0,16}"}
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
    """A grammar as it was written.

    Attributes:
        kind: what it is written in: a JSON schema as JSON, a regular expression, a JSON list of
            strings, a grammar in GBNF or Lark's form, or surely in Lark's.
        text: the grammar.
    """

    kind: GrammarKind
    text: str


class GrammarMatcher:
    """Where one sequence stands in its grammar; belongs to the engine's thread.

    Attributes:
        n_words: the 32-bit words that hold a bit for each token of the vocabulary.
        ended: whether the text is complete: nothing may follow but its end.
    """

    def __init__(self, state: LLMatcher, n_bitmask_words: int) -> None:
        self.n_bitmask_words = n_bitmask_words
        self.is_terminated = False
        self._state = state
        self._spent_s = 0.0
        self._n_steps = 0

    @property
    def error(self) -> str | None:
        """Why the text cannot go on, if it cannot."""
        if self._state.is_error():
            return f"the text left its grammar, or the grammar is too complex: {self._error_text()}"
        if self._spent_s > INITIAL_TIME_BUDGET_S + STEP_TIME_BUDGET_S * self._n_steps:
            return f"the grammar takes {1000 * self._spent_s / self._n_steps:.0f} ms for each token"
        return None

    def fill_bitmask(self, bitmask: Tensor) -> None:
        """Write which tokens may come next, one bit each, [n_words], int32, on the CPU."""
        start_s = time.thread_time()
        self._state.unsafe_compute_mask_ptr(
            bitmask.data_ptr(), bitmask.numel() * bitmask.element_size()
        )
        self._spent_s += time.thread_time() - start_s
        self._n_steps += 1

    def accept_token(self, token: int) -> None:
        """Take the token that was chosen."""
        start_s = time.thread_time()
        self._state.consume_token(token)
        self._spent_s += time.thread_time() - start_s
        self.is_terminated = self._state.is_stopped() and not self._state.is_error()

    def _error_text(self) -> str:
        return str(self._state.get_error()).partition("\n")[0][:200]


class CompiledGrammar:
    """A grammar that is ready to hold texts; any number of them at once.

    Attributes:
        end_ids: the tokens that end a text where the grammar lets it end.
    """

    def __init__(self, state: LLMatcher, ll_tokenizer: LLTokenizer) -> None:
        self.stop_token_ids: tuple[int, ...] = tuple(ll_tokenizer.eos_tokens)
        self._state = state
        self._n_bitmask_words = -(-ll_tokenizer.vocab_size // 32)

    def new_matcher(self) -> GrammarMatcher:
        """Return where a new text begins."""
        return GrammarMatcher(self._state.deep_copy(), self._n_bitmask_words)

    def check_step_time(self) -> None:
        """Take the first step, which is the longest; raises ConstraintError if it is too long."""
        matcher = self.new_matcher()
        matcher.fill_bitmask(torch.zeros(self._n_bitmask_words, dtype=torch.int32))
        if (error := matcher.error) is not None:
            raise GrammarError(error)


class GrammarCompiler:
    """Compiles grammars off the event loop and keeps the latest; belongs to one loop."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._cache: OrderedDict[GrammarSource, CompiledGrammar] = OrderedDict()
        self._compile_semaphore = asyncio.Semaphore(MAX_CONCURRENT_COMPILATIONS)

    async def compile(self, source: GrammarSource) -> CompiledGrammar:
        """Return the grammar.

        Raises:
            ConstraintError: it is none, too large, or more than is computed here.
        """
        if (cached := self._cache.get(source)) is not None:
            self._cache.move_to_end(source)
            return cached
        size_bytes = len(source.text.encode())
        if size_bytes > MAX_GRAMMAR_BYTES:
            raise GrammarError(f"it has {size_bytes} bytes, at most {MAX_GRAMMAR_BYTES} are read")
        grammar = await self._compile_in_thread(source)
        self._cache[source] = grammar
        while len(self._cache) > MAX_CACHED_GRAMMARS:
            self._cache.popitem(last=False)
        return grammar

    async def _compile_in_thread(self, source: GrammarSource) -> CompiledGrammar:
        await self._compile_semaphore.acquire()
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(None, compile_grammar, source, self._vocabulary)
        # Held until the thread is done, in time or not: nothing can interrupt it.
        future.add_done_callback(lambda _: self._compile_semaphore.release())
        try:
            return await asyncio.wait_for(asyncio.shield(future), COMPILE_TIMEOUT_S)
        except TimeoutError:
            future.add_done_callback(_consume_exception)
            raise GrammarError(f"it was not compiled within {COMPILE_TIMEOUT_S:.0f} s") from None


def compile_grammar(source: GrammarSource, vocabulary: Vocabulary) -> CompiledGrammar:
    """Return the grammar; takes milliseconds, or seconds for the worst that the limits let pass."""
    ll_tokenizer = vocabulary.ll_tokenizer
    try:
        state = LLMatcher(ll_tokenizer, _to_llguidance(source), log_level=0, limits=_PARSER_LIMITS)
    except (ValueError, RecursionError) as error:
        raise GrammarError(str(error).partition("\n")[0][:200]) from error
    if state.is_error():
        raise GrammarError(str(state.get_error()).partition("\n")[0][:200])
    grammar = CompiledGrammar(state, ll_tokenizer)
    grammar.check_step_time()
    return grammar


def _to_llguidance(source: GrammarSource) -> str:
    if source.kind == "json_schema":
        return str(LLMatcher.grammar_from_json_schema(source.text, overrides=JSON_OPTIONS))
    return str(grammar_from(source.kind, source.text))


def _consume_exception(future: "asyncio.Future[CompiledGrammar]") -> None:
    future.exception()


def apply_grammar_bitmask(scores: Tensor, rows: Sequence[tuple[int, GrammarMatcher]]) -> None:
    """Forbid what the grammars do not allow next in the scores, [N, V], in place."""
    if not rows:
        return
    n_vocab = scores.shape[-1]
    bitmask = torch.zeros(len(rows), rows[0][1].n_bitmask_words, dtype=torch.int32)  # [R, W]
    for packed, (_, matcher) in zip(bitmask, rows, strict=True):
        matcher.fill_bitmask(packed)
    forbidden = numpy.unpackbits(
        (~bitmask).numpy().view(numpy.uint8), axis=-1, count=n_vocab, bitorder="little"
    )  # [R, V], of 0 and 1
    masks = torch.from_numpy(forbidden).view(torch.bool).to(scores.device)  # [R, V]
    for mask, (row, _) in zip(masks, rows, strict=True):
        scores[row].masked_fill_(mask, -torch.inf)
