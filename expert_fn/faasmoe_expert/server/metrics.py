"""Prometheus metrics of one sandbox: what Python computed, and what its mailboxes did.

Mailboxes are served without Python, so their counts are read when the metrics are rendered.
Metrics reveal neither experts nor tokens: what follows the gates' choices, such as frames, rows and
which functions are attached, is shown by windows of many tokens (`shown_work`), refusals at once.
"""

from __future__ import annotations

import bisect
import itertools
import time
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from faasmoe_expert.server.shown_work import BUCKETS_S, Work, WorkWindow
from faasmoe_kernels.sandbox_loop import SandboxCounters, SlotStatus

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
    """Prometheus metrics of one sandbox, in their own registry.

    Args:
        min_tokens: tokens of the windows in which work is shown; 1 shows it at once.
    """

    def __init__(self, *, min_tokens: int = 1) -> None:
        self.registry = CollectorRegistry()
        self.mailboxes = Gauge(
            "faasmoe_expert_mailboxes", "Mailboxes of routers.", registry=self.registry
        )
        self.refused = Counter(
            "faasmoe_expert_refused_total", "Requests refused.", ["code"], registry=self.registry
        )
        self.functions = FunctionMetrics()
        self._window = WorkWindow(min_tokens)
        self._shown = ShownMetrics(self._window, self.functions.registry)
        self.registry.register(self._shown)
        self._python_frames = self._python_rows = self._shared_frames = 0
        self._computations = [0] * (len(BUCKETS_S) + 1)
        self._compute_s = 0.0
        self._read_counters: ReadCounters | None = None
        self._counted_statuses = dict.fromkeys(SlotStatus, 0)

    def include_mailboxes(self, read: ReadCounters) -> None:
        """Add from now on what mailboxes count."""
        self._read_counters = read

    def count_batch(self, *, n_frames: int, n_rows: int, seconds: float) -> None:
        """Count frames that Python computed as one batch."""
        self._python_frames += n_frames
        self._python_rows += n_rows
        self._computations[bisect.bisect_left(BUCKETS_S, seconds)] += 1
        self._compute_s += seconds

    def count_shared_frame(self) -> None:
        """Count a frame that came in shared memory."""
        self._shared_frames += 1

    def set_functions(self, sizes_bytes: Iterable[int], *, n_layers: int) -> None:
        """Say which functions are attached.

        Args:
            sizes_bytes: the size of each one's parameters.
            n_layers: layers that they have together.
        """
        sizes = list(sizes_bytes)
        self.functions.n_attached.set(len(sizes))
        self.functions.n_bytes.set(sum(sizes))
        self._window.set_layers(n_layers)

    def render(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        counters = None if self._read_counters is None else self._read_counters()
        if counters is not None:
            self.mailboxes.set(counters.n_mailboxes)
            self._count_refused(counters)
        if self._window.end(self._done(counters), time.monotonic()):
            self._shown.take_functions()
        return generate_latest(self.registry)

    def _done(self, counters: SandboxCounters | None) -> Work:
        python = Work(
            python_frames=self._python_frames,
            shared_frames=self._shared_frames,
            more_rows=self._python_rows - self._python_frames,
            computations=tuple(self._computations),
            compute_s=self._compute_s,
        )
        if counters is None:
            return python
        return python + Work(
            mailbox_frames=counters.frames,
            more_rows=counters.rows - counters.frames,
            computations=counters.seconds_buckets,
            compute_s=counters.seconds_sum,
        )

    def _count_refused(self, counters: SandboxCounters) -> None:
        for status, code in REFUSED_CODES.items():
            new = counters.statuses[status] - self._counted_statuses[status]
            if new:
                self.refused.labels(code).inc(new)
        self._counted_statuses = counters.statuses


class FunctionMetrics:
    """Metrics of the attached functions, in their own registry.

    Which functions are attached follows calls, so they are shown as they were at a window's end.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
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
        self.n_attached = Gauge(
            "faasmoe_expert_functions", "Functions attached.", registry=self.registry
        )
        self.n_bytes = Gauge(
            "faasmoe_expert_function_bytes",
            "Bytes of the attached functions' parameters.",
            registry=self.registry,
        )


class ShownMetrics(Collector):
    """The metrics of a window's work, and of the functions at its end."""

    def __init__(self, window: WorkWindow, functions: CollectorRegistry) -> None:
        self._window = window
        self._functions = functions
        self._families: list[Metric] = []
        self.take_functions()

    def take_functions(self) -> None:
        """Show the functions as they are now."""
        self._families = list(self._functions.collect())

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics."""
        shown = self._window.shown
        counters = {
            "frames": ("Frames computed.", shown.frames),
            "shared_frames": ("Frames computed from shared memory.", shown.shared_frames),
            "mailbox_frames": (
                "Frames computed from mailboxes, without Python.",
                shown.mailbox_frames,
            ),
            "rows": ("Rows of hidden states computed.", shown.rows),
        }
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(f"faasmoe_expert_{name}", text, value=value)
        bounds = [*map(floatToGoString, BUCKETS_S), "+Inf"]
        totals = itertools.accumulate(shown.computations)
        yield HistogramMetricFamily(
            "faasmoe_expert_compute_seconds",
            "Time to compute a batch of frames.",
            buckets=list(zip(bounds, totals, strict=True)),
            sum_value=shown.compute_s,
        )
        yield from self._families
