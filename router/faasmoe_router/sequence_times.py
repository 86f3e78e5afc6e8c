"""When things happened to a sequence, and how many tokens it has: for metrics and traces."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SequenceTimes:
    """When things happened to a sequence, in monotonic seconds.

    Attributes:
        arrival_s: it was queued.
        started_s: it was handed to the batcher.
        first_token_s: its first token was there.
        last_token_s: its last token was there.
    """

    arrival_s: float
    started_s: float
    first_token_s: float
    last_token_s: float

    @property
    def queue_s(self) -> float:
        """Seconds in the queue."""
        return self.started_s - self.arrival_s

    @property
    def prefill_s(self) -> float:
        """Seconds from the queue to the first token."""
        return self.first_token_s - self.started_s

    @property
    def decode_s(self) -> float:
        """Seconds from the first token to the last."""
        return self.last_token_s - self.first_token_s


@dataclass(frozen=True, slots=True)
class SequenceCounts:
    """Tokens of a sequence, and how often it gave up its place.

    Attributes:
        prompt: tokens of its prompt.
        cached: of these, tokens found in the prefix cache.
        generated: tokens generated.
        preempted: times that it was preempted.
    """

    prompt: int
    cached: int
    generated: int
    preempted: int = 0
