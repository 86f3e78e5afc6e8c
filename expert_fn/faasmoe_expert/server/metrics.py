"""A sandbox's metrics, in aggregate: nothing here tells which expert or whose tokens."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


class SandboxMetrics:
    """Counters of one sandbox, on a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.frames = Counter(
            "faasmoe_expert_frames_total", "Frames computed.", registry=self.registry
        )
        self.shared_frames = Counter(
            "faasmoe_expert_shared_frames_total",
            "Frames computed that lay in memory shared with a router of this machine.",
            registry=self.registry,
        )
        self.rows = Counter(
            "faasmoe_expert_rows_total", "Rows of hidden states computed.", registry=self.registry
        )
        self.refused = Counter(
            "faasmoe_expert_refused_total", "Requests refused.", ["code"], registry=self.registry
        )
        self.compute_seconds = Histogram(
            "faasmoe_expert_compute_seconds",
            "Time to compute a frame, or several that were gathered, as one.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.attach_seconds = Histogram(
            "faasmoe_expert_attach_seconds",
            "Time to attach a function.",
            buckets=SECONDS,
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

    def text(self) -> bytes:
        """Return the exposition text."""
        return generate_latest(self.registry)
