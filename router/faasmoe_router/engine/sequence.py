"""One request that runs: tokens in, text out."""

from collections import deque
from collections.abc import Collection
from dataclasses import replace

from faasmoe_router.engine.ending import FinishReason
from faasmoe_router.engine.generation import Delta, GenerationRequest
from faasmoe_router.engine.logprobs import TokenLogprob
from faasmoe_router.engine.steps import Steps
from faasmoe_router.engine.stops import StopMatcher
from faasmoe_router.engine.text import Detokenizer


class Sequence:
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
        end_ids: Collection[int],
        steps: Steps | None = None,
    ) -> None:
        self.request = request
        self.n_tokens = 0
        self._detokenizer = detokenizer
        self._stops = StopMatcher(request.ending.stops, included=request.ending.included)
        self._end_ids = frozenset(end_ids)
        self._steps = steps
        self._n_decoded = 0
        self._n_emitted = 0
        self._untold: deque[tuple[int, TokenLogprob]] = deque()

    def go_on_by(self, steps: Steps | None) -> None:
        """Take what another batcher keeps for the request, as the one before it has died."""
        self._steps = steps

    def take(self, tokens: list[int]) -> Delta:
        """Take the tokens that were generated since the last call."""
        text = ""
        for n_taken, token in enumerate(tokens, start=1):
            self.n_tokens += 1
            logprob = self._logprob()
            if token in self._end_ids and not self.request.ending.included:
                return self._end(text, n_taken, "stop", self._stop_token(token))
            if logprob is not None:
                self._untold.append((self._n_decoded, logprob))
            emitted, stopped = self._emit(self._detokenizer.feed(token))
            text += emitted
            if stopped:
                return self._delta(text, n_taken, "stop")
            if (reason := self._reason_after(token)) is not None:
                return self._end(text, n_taken, reason, self._stop_token(token))
        return self._delta(text, len(tokens))

    def _reason_after(self, token: int) -> FinishReason | None:
        """Return why the text ends with this token, if it does."""
        if token in self._end_ids:
            return "stop"
        if self._steps is not None and self._steps.ended_after == self.n_tokens:
            return "stop"
        return "length" if self.n_tokens >= self.request.max_tokens else None

    def _emit(self, text: str) -> tuple[str, bool]:
        self._n_decoded += len(text)
        if self.n_tokens <= self.request.ending.min_tokens:
            return text, False
        return self._stops.feed(text)

    def _stop_token(self, token: int) -> int | None:
        """Return the token if it is one by which the request itself lets the text end."""
        return token if token in self.request.ending.stop_ids else None

    def _end(self, text: str, n_taken: int, reason: FinishReason, stop_token: int | None) -> Delta:
        emitted, stopped = self._emit(self._detokenizer.flush())
        if stopped:
            return self._delta(text + emitted, n_taken, "stop")
        delta = self._delta(text + emitted + self._stops.flush(), n_taken, reason)
        told = (*delta.logprobs, *self._told(self._n_decoded))
        return replace(delta, logprobs=told, stop_reason=stop_token)

    def _delta(self, text: str, n_taken: int, reason: FinishReason | None = None) -> Delta:
        self._n_emitted += len(text)
        told = self._told(self._n_emitted - 1)
        return Delta(text, n_taken, reason, told, stop_reason=self._stops.found)

    def _logprob(self) -> TokenLogprob | None:
        if self._steps is None or self._steps.logprobs is None:
            return None
        return self._steps.logprobs.take()

    def _told(self, last: int) -> tuple[tuple[int, TokenLogprob], ...]:
        """Return the log-probabilities of tokens whose text begins here or before, and where."""
        told = []
        while self._untold and self._untold[0][0] <= last:
            told.append(self._untold.popleft())
        return tuple(told)
