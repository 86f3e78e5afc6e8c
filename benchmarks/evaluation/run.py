"""One run of a strategy: deploy, warm up, send the workload while metering, scrape counters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
from benchmarks.evaluation.client import RequestResult, WorkloadResult, run_workload
from benchmarks.evaluation.meter import ProcessTree, ResourceUsage, metering
from benchmarks.evaluation.strategies import Strategy, StrategyDeployment, StrategySettings
from benchmarks.evaluation.workload import Workload
from benchmarks.report import percentile

ROUTER_COUNTERS = {
    "calls": "faasmoe_router_function_calls_total",
    "failed_calls": "faasmoe_router_function_call_failures_total",
    "local": "faasmoe_router_local_computations_total",
    "colocated": "faasmoe_router_colocated_computations_total",
    "sent_bytes": "faasmoe_router_function_sent_bytes_total",
    "received_bytes": "faasmoe_router_function_received_bytes_total",
}
CONTROL_COUNTERS = {"activations": "faasmoe_control_activations_total"}


def metric_total(text: str, name: str) -> float:
    """Return the sum of a metric over all label values; 0 without samples."""
    return sum(
        float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if line.startswith((f"{name} ", f"{name}{{"))
    )


def parse_counters(text: str, names: Mapping[str, str]) -> dict[str, float]:
    """Return counters of one process from its Prometheus exposition.

    Args:
        text: the exposition.
        names: metric names by the names to return.

    Raises:
        ValueError: a metric is not exposed.
    """
    for metric in names.values():
        if f"# TYPE {metric.removesuffix('_total')}" not in text:
            raise ValueError(f"metrics: got no metric {metric}")
    return {name: metric_total(text, metric) for name, metric in names.items()}


def sum_counters(by_process: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the sums of the counters of several processes."""
    sums: dict[str, float] = {}
    for counters in by_process:
        for name, value in counters.items():
            sums[name] = sums.get(name, 0.0) + value
    return sums


def counter_deltas(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Return the increase of each counter."""
    return {name: value - before.get(name, 0.0) for name, value in after.items()}


async def scrape_counters(router_urls: Iterable[str], control_url: str | None) -> dict[str, float]:
    """Return the counters of a strategy, summed over its processes."""
    async with aiohttp.ClientSession(raise_for_status=True) as http:
        counters = [parse_counters(await _text(http, url), ROUTER_COUNTERS) for url in router_urls]
        if control_url is not None:
            counters.append(parse_counters(await _text(http, control_url), CONTROL_COUNTERS))
    return sum_counters(counters)


async def _text(http: aiohttp.ClientSession, url: str) -> str:
    async with http.get(f"{url}/metrics") as response:
        return await response.text()


PERCENTILES = (50, 95, 99)
GB = 1e9


@dataclass(frozen=True, slots=True)
class StrategyRun:
    """The measurements of one run of a strategy.

    Attributes:
        workload_result: outcome of all requests.
        usage: CPU time and memory of all processes.
        counters: increase of the counters of all processes.
    """

    workload_result: WorkloadResult
    usage: ResourceUsage
    counters: Mapping[str, float]

    @property
    def successful_results(self) -> tuple[RequestResult, ...]:
        """Results of the requests that did not fail."""
        return tuple(result for result in self.workload_result.results if not result.error)

    @property
    def n_tokens(self) -> int:
        """Number of generated tokens."""
        return sum(result.n_tokens for result in self.successful_results)

    @property
    def ttfts_s(self) -> list[float]:
        """Times to first token."""
        return [result.ttft_s for result in self.successful_results]

    @property
    def tpots_s(self) -> list[float]:
        """Times per token after the first."""
        return [result.tpot_s for result in self.successful_results if result.tpot_s is not None]

    @property
    def cold_starts_s(self) -> list[float]:
        """Queueing times of the requests that waited for the activation of functions."""
        return [result.queued_s for result in self.successful_results if result.queued_s > 0]

    def figures(self) -> dict[str, float | None]:
        """Return the figures of the run; None for a latency without samples."""
        tokens = self.n_tokens or float("nan")
        wire_bytes = self.counters["sent_bytes"] + self.counters["received_bytes"]
        return {
            "tokens_per_s": self.n_tokens / self.workload_result.busy_s,
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
            "queued_requests": float(len(self.cold_starts_s)),
            **_percentiles("cold_start", self.cold_starts_s),
            "tokens": float(self.n_tokens),
            "requests": float(len(self.workload_result.results)),
            "failures": float(len(self.workload_result.results) - len(self.successful_results)),
            "time_s": self.usage.time_s,
        }

    def details(self) -> dict[str, Any]:
        """Return latencies, texts, memory over time and errors, for plots and comparisons."""
        return {
            "ttfts_s": self.ttfts_s,
            "tpots_s": self.tpots_s,
            "cold_starts_s": self.cold_starts_s,
            "memory": [[s.at_s, s.total / GB, s.anonymous / GB] for s in self.usage.samples],
            "texts": {f"{r.tenant}-{r.number}": r.text for r in self.successful_results},
            "errors": [result.error for result in self.workload_result.results if result.error],
        }


async def measure_strategy(
    strategy: Strategy,
    settings: StrategySettings,
    *,
    warm_up: Workload,
    workload: Workload,
    progress: Callable[[], object],
    interval_s: float,
) -> StrategyRun:
    """Deploy a strategy, warm it up and measure a workload.

    Args:
        strategy: the strategy.
        settings: its settings.
        warm_up: workload that touches all weights before the measurement.
        workload: the measured workload.
        progress: called after each response of the measured workload.
        interval_s: interval between memory samples.

    Raises:
        RuntimeError: the warm-up failed.
    """
    async with strategy.deploy(settings) as deployment:
        await _warm_up(deployment, warm_up)
        if not workload.is_closed_loop:
            await (
                deployment.wait_idle()
            )  # an open-loop workload starts at night, with idle functions
        before = await scrape_counters(deployment.router_urls, deployment.control_url)
        async with metering(ProcessTree(deployment.roots), interval_s=interval_s) as usage:
            workload_result = await run_workload(workload, deployment.endpoints, progress=progress)
        after = await scrape_counters(deployment.router_urls, deployment.control_url)
        return StrategyRun(workload_result, usage, counter_deltas(before, after))


async def _warm_up(deployment: StrategyDeployment, warm_up: Workload) -> None:
    result = await run_workload(warm_up, deployment.endpoints, progress=lambda: None)
    errors = [request.error for request in result.results if request.error]
    if errors:
        raise RuntimeError(f"{len(errors)} warm-up requests failed; the first: {errors[0]}")


def _percentiles(name: str, values: Sequence[float]) -> dict[str, float | None]:
    return {
        f"{name}_p{percent}_s": percentile(values, percent) if values else None
        for percent in PERCENTILES
    }
