"""Prometheus metrics of one sandbox: what Python computed, and what its mailboxes did.

Mailboxes are served without Python, so their counts are read when the metrics are rendered.
Metrics are aggregates that reveal neither experts nor tokens.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from faasmoe_kernels.sandbox_loop import SandboxCounters, SlotStatus

BUCKETS_S = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)

REFUSED_CODES = {
    SlotStatus.UNKNOWN_FUNCTION: "unknown_function",
    SlotStatus.DRAINING: "draining",
    SlotStatus.EXPIRED: "expired",
    SlotStatus.BAD_FRAME: "bad_frame",
    SlotStatus.FAILED: "internal",
}
"""Codes of declined frames; those that only belong to HTTP are no refusals."""

ReadCounters = Callable[[], SandboxCounters]


class SandboxMetrics:
    """Prometheus metrics of one sandbox, in their own registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.frames = Counter(
            "faasmoe_expert_frames_total", "Frames computed.", registry=self.registry
        )
        self.shared_frames = Counter(
            "faasmoe_expert_shared_frames_total",
            "Frames computed from shared memory.",
            registry=self.registry,
        )
        self.mailbox_frames = Counter(
            "faasmoe_expert_mailbox_frames_total",
            "Frames computed from mailboxes, without Python.",
            registry=self.registry,
        )
        self.mailboxes = Gauge(
            "faasmoe_expert_mailboxes", "Mailboxes of routers.", registry=self.registry
        )
        self.mailbox_frames_in_flight = Gauge(
            "faasmoe_expert_mailbox_frames_in_flight",
            "Frames of mailboxes being computed or waiting for their turn.",
            registry=self.registry,
        )
        self.rows = Counter(
            "faasmoe_expert_rows_total", "Rows of hidden states computed.", registry=self.registry
        )
        self.refused = Counter(
            "faasmoe_expert_refused_total", "Requests refused.", ["code"], registry=self.registry
        )
        self.compute_seconds = ComputeSeconds()
        self.registry.register(self.compute_seconds)
        self.attach_seconds = Histogram(
            "faasmoe_expert_attach_seconds",
            "Time to attach a function.",
            buckets=BUCKETS_S,
            registry=self.registry,
        )
        self.fetch_seconds = Histogram(
            "faasmoe_expert_fetch_seconds",
            "Time to fetch a function's blocks from block servers.",
            buckets=BUCKETS_S,
            registry=self.registry,
        )
        self.fetched_bytes = Counter(
            "faasmoe_expert_fetched_bytes_total",
            "Bytes of blocks fetched from block servers.",
            registry=self.registry,
        )
        self.functions = Gauge(
            "faasmoe_expert_functions", "Functions attached.", registry=self.registry
        )
        self.function_bytes = Gauge(
            "faasmoe_expert_function_bytes",
            "Bytes of the attached functions' parameters.",
            registry=self.registry,
        )
        self._read_counters: ReadCounters | None = None
        self._counted_frames = self._counted_rows = 0
        self._counted_statuses = dict.fromkeys(SlotStatus, 0)

    def include_mailboxes(self, read: ReadCounters) -> None:
        """Add from now on what mailboxes count."""
        self._read_counters = read

    def render(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        if self._read_counters is not None:
            self._count_mailboxes(self._read_counters())
        return generate_latest(self.registry)

    def _count_mailboxes(self, counters: SandboxCounters) -> None:
        new_frames = counters.frames - self._counted_frames
        self.frames.inc(new_frames)
        self.mailbox_frames.inc(new_frames)
        self.rows.inc(counters.rows - self._counted_rows)
        self.mailboxes.set(counters.n_mailboxes)
        self.mailbox_frames_in_flight.set(counters.n_running)
        for status, code in REFUSED_CODES.items():
            new = counters.statuses[status] - self._counted_statuses[status]
            if new:
                self.refused.labels(code).inc(new)
        self._counted_frames, self._counted_rows = counters.frames, counters.rows
        self._counted_statuses = counters.statuses
        self.compute_seconds.set_mailboxes(counters.seconds_buckets, counters.seconds_sum)


class ComputeSeconds(Collector):
    """Histogram of compute times, whose counts partly come from mailboxes as a whole."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BUCKETS_S) + 1)  # not cumulative
        self._sum_s = 0.0
        self._mailbox_counts: tuple[int, ...] = (0,) * len(self._counts)
        self._mailbox_sum_s = 0.0

    def observe(self, seconds: float) -> None:
        """Record one computation."""
        self._counts[bisect.bisect_left(BUCKETS_S, seconds)] += 1
        self._sum_s += seconds

    def set_mailboxes(self, counts: tuple[int, ...], sum_s: float) -> None:
        """Replace the totals of mailboxes: computations by bucket, and their time."""
        self._mailbox_counts, self._mailbox_sum_s = counts, sum_s

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """Yield the histogram."""
        counts = [a + b for a, b in zip(self._counts, self._mailbox_counts, strict=True)]
        bounds = [*map(floatToGoString, BUCKETS_S), "+Inf"]
        yield HistogramMetricFamily(
            "faasmoe_expert_compute_seconds",
            "Time to compute a batch of frames.",
            buckets=list(zip(bounds, itertools.accumulate(counts), strict=True)),
            sum_value=self._sum_s + self._mailbox_sum_s,
        )
