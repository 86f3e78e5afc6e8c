"""Output processing of one sequence: tokens in, text, log-probabilities and finish reason out.

Detokenizes incrementally, matches stop tokens and stop strings, and holds back text that may still
become part of a stop string. Log-probabilities are released together with the text of their tokens.
"""

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import replace

from faasmoe_router.engine.batch_sampler import LogitsState
from faasmoe_router.engine.generation import CompletionOutput, FinishReason, GenerationRequest
from faasmoe_router.engine.journal import Progress
from faasmoe_router.engine.sampler import LogprobQueue, SampledLogprob
from faasmoe_router.engine.tokenizer import Detokenizer


class StopStringMatcher:
    """Matches stop strings in a stream of text, across the boundaries of its pieces.

    The stop string that is completed first wins. Text is held back only while it may be a prefix of
    a stop string.

    Args:
        stop_strings: the stop strings; ValueError if one is empty.
        include_stop: whether the matched stop string is emitted as text.

    Attributes:
        matched_stop: the stop string that ended the text; None until one matches.
    """

    def __init__(self, stop_strings: Sequence[str], *, include_stop: bool = False) -> None:
        if any(not stop for stop in stop_strings):
            raise ValueError(
                f"stop_strings: got {list(stop_strings)!r}, expected non-empty strings"
            )
        self._stop_strings = tuple(stop_strings)
        self._include_stop = include_stop
        self.matched_stop: str | None = None
        self._max_stop_length = max(map(len, stop_strings), default=0)
        self._held_back = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """Process more text; return the text to emit and whether a stop string matched."""
        if not self._stop_strings:
            return text, False
        text = self._held_back + text
        matches = [
            (start + len(stop), start)
            for stop in self._stop_strings
            if (start := text.find(stop)) >= 0
        ]
        if matches:
            self._held_back = ""
            end, start = min(matches)
            self.matched_stop = text[start:end]
            return text[: end if self._include_stop else start], True
        n_held_back = self._partial_match_length(text)
        self._held_back = text[len(text) - n_held_back :]
        return text[: len(text) - n_held_back], False

    def flush(self) -> str:
        """Return the text held back; called at the end of the text."""
        held_back, self._held_back = self._held_back, ""
        return held_back

    def _partial_match_length(self, text: str) -> int:
        """Return the length of the longest suffix of the text that is a stop string's prefix."""
        for length in range(min(len(text), self._max_stop_length - 1), 0, -1):
            suffix = text[-length:]
            if any(stop.startswith(suffix) for stop in self._stop_strings):
                return length
        return 0


class ReplayedState:
    """Stands for the logits state of tokens that another process has sampled.

    Args:
        progress: the tokens.
        n_tokens: number of output tokens of the sequence after them.

    Attributes:
        logprob_queue: their log-probabilities; None if there are none.
        n_tokens_at_grammar_end: as of a LogitsState.
    """

    def __init__(self, progress: Progress, n_tokens: int) -> None:
        self.logprob_queue: LogprobQueue | None = None
        if progress.logprobs:
            self.logprob_queue = LogprobQueue(0)
            for logprob in progress.logprobs:
                self.logprob_queue.append(logprob)
        self.n_tokens_at_grammar_end = n_tokens if progress.ends_grammar else None


class SequenceOutputProcessor:
    """Turns the tokens of one sequence into `CompletionOutput`s until a stop condition applies.

    Args:
        request: the request that the sequence belongs to.
        detokenizer: a new detokenizer.
        stop_token_ids: tokens that end the text.
        logits_state: the request's logits-processing state, if it has one; supplies
            log-probabilities and the end of the grammar.

    Attributes:
        n_tokens: number of output tokens processed.
    """

    def __init__(
        self,
        request: GenerationRequest,
        *,
        detokenizer: Detokenizer,
        stop_token_ids: Collection[int],
        logits_state: LogitsState | None = None,
    ) -> None:
        self.request = request
        self.n_tokens = 0
        self._n_forced = request.n_forced  # tokens of the prompt still to come
        self._detokenizer = detokenizer
        self._stop_matcher = StopStringMatcher(
            request.stop_conditions.stop_strings, include_stop=request.stop_conditions.include_stop
        )
        self._stop_token_ids = frozenset(stop_token_ids)
        grammar = request.sampling_params.grammar
        self._grammar_stop_token_ids = frozenset(() if grammar is None else grammar.stop_token_ids)
        self._logits_state: LogitsState | ReplayedState | None = logits_state
        self._new_logprobs: list[SampledLogprob] = []  # of the tokens being processed
        self._n_decoded = 0
        self._n_emitted = 0
        self._pending_logprobs: deque[tuple[int, SampledLogprob]] = deque()

    def set_logits_state(self, logits_state: LogitsState | None) -> None:
        """Replace the logits state, when the request is resumed by another batcher."""
        self._logits_state = logits_state

    def replay(self, progress: Progress) -> CompletionOutput:
        """Process tokens that another process has sampled; return its output."""
        n_sampled = max(0, len(progress.token_ids) - self._n_forced)
        self._logits_state = ReplayedState(progress, self.n_tokens + n_sampled)
        return self.process_tokens(list(progress.token_ids))

    def process_tokens(self, tokens: list[int]) -> CompletionOutput:
        """Process the tokens generated since the last call.

        Tokens after the one that ends the sequence are ignored.
        """
        self._new_logprobs = []
        forced, tokens = tokens[: self._n_forced], tokens[self._n_forced :]
        self._n_forced -= len(forced)
        prompt_logprobs = tuple(
            logprob for _ in forced if (logprob := self._next_logprob()) is not None
        )
        is_over = self.request.max_tokens == 0 and not self._n_forced
        output = CompletionOutput("", 0, "length") if is_over else self._process_sampled(tokens)
        token_ids = tuple(tokens[: output.n_tokens])
        progress = Progress((*forced, *token_ids), tuple(self._new_logprobs), self._ends_grammar)
        return replace(
            output, token_ids=token_ids, prompt_logprobs=prompt_logprobs, progress=progress
        )

    def _process_sampled(self, tokens: list[int]) -> CompletionOutput:
        text = ""
        for n_processed, token in enumerate(tokens, start=1):
            self.n_tokens += 1
            logprob = self._next_logprob()
            if self._is_stop(token) and not self.request.stop_conditions.include_stop:
                if logprob is not None and self.request.scores_stop:
                    self._pending_logprobs.append((self._n_decoded, logprob))
                return self._finish(text, n_processed, "stop", self._requested_stop_token(token))
            if logprob is not None:
                self._pending_logprobs.append((self._n_decoded, logprob))
            emitted, stopped = self._match_stops(self._detokenizer.feed(token))
            text += emitted
            if stopped:
                return self._make_output(text, n_processed, "stop")
            if (reason := self._finish_reason_after(token)) is not None:
                return self._finish(text, n_processed, reason, self._requested_stop_token(token))
        return self._make_output(text, len(tokens))

    def _is_stop(self, token: int) -> bool:
        """Whether a token stands for the end of the text: the model's, the request's, a grammar's.

        A grammar's is the tokenizer's own where the model has none.
        """
        is_grammars = token in self._grammar_stop_token_ids and self._ends_grammar
        return token in self._stop_token_ids or is_grammars

    def _finish_reason_after(self, token: int) -> FinishReason | None:
        """Return why the sequence ends with this token; None if it continues."""
        if token in self._stop_token_ids:
            return "stop"
        if self._ends_grammar:
            return "stop"
        return "length" if self.n_tokens >= self.request.max_tokens else None

    @property
    def _ends_grammar(self) -> bool:
        """Whether the last token completed the text that the grammar allows."""
        state = self._logits_state
        return state is not None and state.n_tokens_at_grammar_end == self.n_tokens

    def _match_stops(self, text: str) -> tuple[str, bool]:
        self._n_decoded += len(text)
        if self.n_tokens <= self.request.stop_conditions.min_tokens:
            return text, False
        return self._stop_matcher.feed(text)

    def _requested_stop_token(self, token: int) -> int | None:
        """Return the token if the request names it as a stop token; EOS tokens do not count."""
        return token if token in self.request.stop_conditions.stop_token_ids else None

    def _finish(
        self, text: str, n_processed: int, reason: FinishReason, stop_token: int | None
    ) -> CompletionOutput:
        emitted, stopped = self._match_stops(self._detokenizer.flush())
        if stopped:
            return self._make_output(text + emitted, n_processed, "stop")
        text += emitted + self._stop_matcher.flush()
        output = self._make_output(text, n_processed, reason)
        logprobs = (*output.logprobs, *self._pop_logprobs(self._n_decoded))
        return replace(output, logprobs=logprobs, stop_reason=stop_token)

    def _make_output(
        self, text: str, n_processed: int, reason: FinishReason | None = None
    ) -> CompletionOutput:
        self._n_emitted += len(text)
        is_end = reason is not None and self.request.scores_stop
        logprobs = self._pop_logprobs(self._n_decoded if is_end else self._n_emitted - 1)
        return CompletionOutput(
            text, n_processed, reason, logprobs, stop_reason=self._stop_matcher.matched_stop
        )

    def _next_logprob(self) -> SampledLogprob | None:
        if self._logits_state is None or self._logits_state.logprob_queue is None:
            return None
        logprob = self._logits_state.logprob_queue.pop_first()
        self._new_logprobs.append(logprob)
        return logprob

    def _pop_logprobs(self, last_offset: int) -> tuple[tuple[int, SampledLogprob], ...]:
        """Return (offset, log-probability) of pending tokens up to an offset, in characters."""
        logprobs = []
        while self._pending_logprobs and self._pending_logprobs[0][0] <= last_offset:
            logprobs.append(self._pending_logprobs.popleft())
        return tuple(logprobs)
