"""Counters that the strategies' processes tell in Prometheus's text form. Pure but for `scrape`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import aiohttp

ROUTER_COUNTERS = {
    "calls": "faasmoe_router_function_calls_total",
    "failed_calls": "faasmoe_router_function_call_failures_total",
    "local": "faasmoe_router_local_computations_total",
    "sent_bytes": "faasmoe_router_function_sent_bytes_total",
    "received_bytes": "faasmoe_router_function_received_bytes_total",
}
CONTROL_COUNTERS = {"activations": "faasmoe_control_activations_total"}


def total(text: str, name: str) -> float:
    """Return the sum of a metric over all its labels; 0 if it is not there."""
    return sum(
        float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if line.startswith((f"{name} ", f"{name}{{"))
    )


def counters(text: str, names: Mapping[str, str]) -> dict[str, float]:
    """Return the counters of one process, by our own names; raises ValueError of one not told."""
    for metric in names.values():
        if f"# TYPE {metric.removesuffix('_total')}" not in text:
            raise ValueError(f"metrics: got none that is called {metric}")
    return {name: total(text, metric) for name, metric in names.items()}


def added(some: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the sums of the counters of several processes."""
    sums: dict[str, float] = {}
    for found in some:
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + value
    return sums


def since(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Return by how much counters have grown."""
    return {name: value - before.get(name, 0.0) for name, value in after.items()}


async def scrape(router_urls: Iterable[str], control_url: str | None) -> dict[str, float]:
    """Read all counters of a strategy."""
    async with aiohttp.ClientSession(raise_for_status=True) as http:
        found = [counters(await _text(http, url), ROUTER_COUNTERS) for url in router_urls]
        if control_url is not None:
            found.append(counters(await _text(http, control_url), CONTROL_COUNTERS))
    return added(found)


async def _text(http: aiohttp.ClientSession, url: str) -> str:
    async with http.get(f"{url}/metrics") as response:
        return await response.text()
