"""What one sequence of a request has taken, as spans: queueing, prefill and decoding.

They are made when the sequence has ended, of times that metrics need anyway; a request that is not
recorded costs nothing here. No span is of a single token, and none says anything about functions.
"""

from __future__ import annotations

import time

from faasmoe_router.sequence_times import SequenceCounts, SequenceTimes
from faasmoe_tracing import Attribute, Span, epoch_ns


def record_sequence(
    span: Span,
    times: SequenceTimes,
    counts: SequenceCounts,
    *,
    index: int,
    finish_reason: str,
) -> None:
    """Record a finished sequence below the span of its generation.

    Args:
        span: the generation's span.
        times: when things happened.
        counts: its tokens.
        index: its position in the request.
        finish_reason: why it ended.
    """
    if not span.is_recorded:
        return
    steps: tuple[tuple[str, float, float, dict[str, Attribute]], ...] = (
        ("queue", times.arrival_s, times.started_s, {}),
        (
            "prefill",
            times.started_s,
            times.first_token_s,
            {"faasmoe.prompt_tokens": counts.prompt, "faasmoe.cached_tokens": counts.cached},
        ),
        (
            "decode",
            times.first_token_s,
            times.last_token_s,
            {"faasmoe.generated_tokens": counts.generated, "faasmoe.finish_reason": finish_reason},
        ),
    )
    now_s, now_ns = times.last_token_s, time.time_ns()
    for name, start_s, end_s, attributes in steps:
        child = span.child(
            name,
            start_ns=epoch_ns(start_s, now_s=now_s, now_ns=now_ns),
            attributes={**attributes, "faasmoe.choice": index},
        )
        child.end(epoch_ns(end_s, now_s=now_s, now_ns=now_ns))
