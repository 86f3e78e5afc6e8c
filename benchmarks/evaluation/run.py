"""One run: a strategy is started, warmed up, asked, metered, and ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.evaluation.client import Answer, Played, play
from benchmarks.evaluation.meter import Tree, Usage, metered
from benchmarks.evaluation.scrape import scrape, since
from benchmarks.evaluation.strategies import Deployed, Settings, Strategy
from benchmarks.evaluation.workload import Workload
from benchmarks.report import percentile

PERCENTILES = (50, 95, 99)
GB = 1e9


@dataclass(frozen=True, slots=True)
class Run:
    """What one strategy gave in one run.

    Attributes:
        played: the answers, and how long they took.
        usage: processor time and memory of all its processes.
        counters: what its processes counted.
    """

    played: Played
    usage: Usage
    counters: Mapping[str, float]

    @property
    def answered(self) -> tuple[Answer, ...]:
        """The answers of requests that did not fail."""
        return tuple(answer for answer in self.played.answers if not answer.error)

    @property
    def n_tokens(self) -> int:
        """Tokens generated."""
        return sum(answer.n_tokens for answer in self.answered)

    @property
    def ttfts_s(self) -> list[float]:
        """Times to the first token."""
        return [answer.ttft_s for answer in self.answered]

    @property
    def tpots_s(self) -> list[float]:
        """Times per token after the first."""
        return [answer.tpot_s for answer in self.answered if answer.tpot_s is not None]

    @property
    def cold_starts_s(self) -> list[float]:
        """How long requests were held until their functions were there, if they were."""
        return [answer.held_s for answer in self.answered if answer.held_s > 0]

    def figures(self) -> dict[str, float | None]:
        """Return the run's figures; None is what did not occur."""
        tokens = self.n_tokens or float("nan")
        wire_bytes = self.counters["sent_bytes"] + self.counters["received_bytes"]
        return {
            "tokens_per_s": self.n_tokens / self.played.busy_s,
            **_percentiles("ttft", self.ttfts_s),
            **_percentiles("tpot", self.tpots_s),
            "cpu_s_per_token": self.usage.cpu_s / tokens,
            "cpu_percent": 100 * self.usage.cpu_s / self.usage.time_s,
            "gb_s": self.usage.byte_s / GB,
            "gb_s_per_token": self.usage.byte_s / GB / tokens,
            "mean_gb": self.usage.byte_s / GB / self.usage.time_s,
            "peak_gb": self.usage.peak_bytes / GB,
            "calls_per_token": self.counters["calls"] / tokens,
            "wire_bytes_per_token": wire_bytes / tokens,
            "local_computations": self.counters["local"],
            "activations": self.counters.get("activations", 0.0),
            "held_requests": float(len(self.cold_starts_s)),
            **_percentiles("cold_start", self.cold_starts_s),
            "tokens": float(self.n_tokens),
            "requests": float(len(self.played.answers)),
            "failures": float(len(self.played.answers) - len(self.answered)),
            "time_s": self.usage.time_s,
        }

    def details(self) -> dict[str, Any]:
        """Return what plots and comparisons need: latencies, texts, memory over time, errors."""
        return {
            "ttfts_s": self.ttfts_s,
            "tpots_s": self.tpots_s,
            "cold_starts_s": self.cold_starts_s,
            "memory": [[s.at_s, s.total / GB, s.anonymous / GB] for s in self.usage.samples],
            "texts": {f"{a.tenant}-{a.number}": a.text for a in self.answered},
            "errors": [answer.error for answer in self.played.answers if answer.error],
        }


async def measure(
    strategy: Strategy,
    settings: Settings,
    *,
    warm_up: Workload,
    workload: Workload,
    progress: Callable[[], object],
    interval_s: float,
) -> Run:
    """Run a strategy from its start to its end; only the workload itself is measured.

    Args:
        strategy: how to serve.
        settings: what.
        warm_up: played first, not measured, so that all weights have been touched.
        workload: what is measured.
        progress: called after each answer of the workload.
        interval_s: between readings of memory.
    """
    async with strategy.deploy(settings) as deployed:
        await _warm_up(deployed, warm_up)
        if not workload.is_closed_loop:
            await deployed.become_idle()  # who begins at night begins with what a night leaves
        before = await scrape(deployed.router_urls, deployed.control_url)
        async with metered(Tree(deployed.roots), interval_s=interval_s) as usage:
            played = await play(workload, deployed.endpoints, progress=progress)
        after = await scrape(deployed.router_urls, deployed.control_url)
        return Run(played, usage, since(before, after))


async def _warm_up(deployed: Deployed, warm_up: Workload) -> None:
    played = await play(warm_up, deployed.endpoints, progress=lambda: None)
    errors = [answer.error for answer in played.answers if answer.error]
    if errors:
        raise RuntimeError(f"{len(errors)} requests of the warm-up failed, the first: {errors[0]}")


def _percentiles(name: str, values: Sequence[float]) -> dict[str, float | None]:
    return {
        f"{name}_p{percent}_s": percentile(values, percent) if values else None
        for percent in PERCENTILES
    }
