"""Stop strings in a stream of text: nothing of one is emitted, unless it is asked for.

One request that runs: tokens in, text out.
"""

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import replace

from faasmoe_router.engine.generation import CompletionOutput, FinishReason, GenerationRequest
from faasmoe_router.engine.logits_state import LogitsState
from faasmoe_router.engine.sampler import SampledLogprob
from faasmoe_router.engine.tokenizer import Detokenizer


class StopStringMatcher:
    """Finds the stop string that is complete first, however the text is cut into pieces.

    Text is held back only while it may be the beginning of a stop string.

    Args:
        stops: the stop strings.
        included: whether the one that ends the text is emitted after all.

    Attributes:
        found: the stop string that ended the text, if one did.
    """

    def __init__(self, stop_strings: Sequence[str], *, include_stop: bool = False) -> None:
        if any(not stop for stop in stop_strings):
            raise ValueError(
                f"stops: got {list(stop_strings)!r}, expected strings that are not empty"
            )
        self._stop_strings = tuple(stop_strings)
        self._include_stop = include_stop
        self.matched_stop: str | None = None
        self._max_stop_length = max(map(len, stop_strings), default=0)
        self._held_back = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """Take more text; return what may be emitted and whether a stop string was reached."""
        if not self._stop_strings:
            return text, False
        text = self._held_back + text
        matches = [
            (at + len(stop), at) for stop in self._stop_strings if (at := text.find(stop)) >= 0
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
        """Return what was held back, at the end of the text."""
        held_back, self._held_back = self._held_back, ""
        return held_back

    def _partial_match_length(self, text: str) -> int:
        """Return the length of the longest end of the text that begins some stop string."""
        for length in range(min(len(text), self._max_stop_length - 1), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stop_strings):
                return length
        return 0


class SequenceOutputProcessor:
    """Turns a request's tokens into deltas, up to what ends its text.

    Args:
        request: what was asked for.
        detokenizer: a new one.
        end_ids: the tokens that end the text.
        steps: what the engine's thread keeps for the request, if anything.
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
        self._detokenizer = detokenizer
        self._stop_matcher = StopStringMatcher(
            request.stop_conditions.stop_strings, include_stop=request.stop_conditions.include_stop
        )
        self._stop_token_ids = frozenset(stop_token_ids)
        self._logits_state = logits_state
        self._n_decoded = 0
        self._n_emitted = 0
        self._pending_logprobs: deque[tuple[int, SampledLogprob]] = deque()

    def set_logits_state(self, logits_state: LogitsState | None) -> None:
        """Take what another batcher keeps for the request, as the one before it has died."""
        self._logits_state = logits_state

    def process_tokens(self, tokens: list[int]) -> CompletionOutput:
        """Take the tokens that were generated since the last call."""
        text = ""
        for n_taken, token in enumerate(tokens, start=1):
            self.n_tokens += 1
            logprob = self._next_logprob()
            if token in self._stop_token_ids and not self.request.stop_conditions.include_stop:
                return self._finish(text, n_taken, "stop", self._own_stop_token(token))
            if logprob is not None:
                self._pending_logprobs.append((self._n_decoded, logprob))
            emitted, stopped = self._match_stops(self._detokenizer.feed(token))
            text += emitted
            if stopped:
                return self._make_output(text, n_taken, "stop")
            if (reason := self._finish_reason_after(token)) is not None:
                return self._finish(text, n_taken, reason, self._own_stop_token(token))
        return self._make_output(text, len(tokens))

    def _finish_reason_after(self, token: int) -> FinishReason | None:
        """Return why the text ends with this token, if it does."""
        if token in self._stop_token_ids:
            return "stop"
        if (
            self._logits_state is not None
            and self._logits_state.n_tokens_at_grammar_end == self.n_tokens
        ):
            return "stop"
        return "length" if self.n_tokens >= self.request.max_tokens else None

    def _match_stops(self, text: str) -> tuple[str, bool]:
        self._n_decoded += len(text)
        if self.n_tokens <= self.request.stop_conditions.min_tokens:
            return text, False
        return self._stop_matcher.feed(text)

    def _own_stop_token(self, token: int) -> int | None:
        """Return the token if it is one by which the request itself lets the text end."""
        return token if token in self.request.stop_conditions.stop_token_ids else None

    def _finish(
        self, text: str, n_taken: int, reason: FinishReason, stop_token: int | None
    ) -> CompletionOutput:
        emitted, stopped = self._match_stops(self._detokenizer.flush())
        if stopped:
            return self._make_output(text + emitted, n_taken, "stop")
        output = self._make_output(text + emitted + self._stop_matcher.flush(), n_taken, reason)
        logprobs = (*output.logprobs, *self._pop_logprobs(self._n_decoded))
        return replace(output, logprobs=logprobs, stop_reason=stop_token)

    def _make_output(
        self, text: str, n_taken: int, reason: FinishReason | None = None
    ) -> CompletionOutput:
        self._n_emitted += len(text)
        logprobs = self._pop_logprobs(self._n_emitted - 1)
        return CompletionOutput(
            text, n_taken, reason, logprobs, stop_reason=self._stop_matcher.matched_stop
        )

    def _next_logprob(self) -> SampledLogprob | None:
        if self._logits_state is None or self._logits_state.logprob_queue is None:
            return None
        return self._logits_state.logprob_queue.pop_first()

    def _pop_logprobs(self, last_offset: int) -> tuple[tuple[int, SampledLogprob], ...]:
        """Return the log-probabilities of tokens whose text begins here or before, and where."""
        logprobs = []
        while self._pending_logprobs and self._pending_logprobs[0][0] <= last_offset:
            logprobs.append(self._pending_logprobs.popleft())
        return tuple(logprobs)
