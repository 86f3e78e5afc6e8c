"""Why a model is not ready, and why it is slow: which step, and what to change. Pure.

Of the control plane's status and the router's metrics, since the router has started. A step is
worth a word if it takes a good part of the time that requests take.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NOTABLE_SHARE = 0.2
NOTABLE_FAILURES = 0.01
FULL_CACHE = 0.9
_SAMPLE = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{[^}]*\})? (\S+)$")


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that keeps a model from being ready, or fast.

    Attributes:
        step: where.
        what: what is seen.
        change: what to do.
    """

    step: str
    what: str
    change: str

    def __str__(self) -> str:
        return f"{self.step}: {self.what}\n    {self.change}"


@dataclass(frozen=True, slots=True)
class StepTime:
    """What requests took in one step.

    Attributes:
        name: the step.
        mean_s: mean seconds of a request.
        share: part of the time of all requests, from 0 to 1.
    """

    name: str
    mean_s: float
    share: float


def parse_totals(exposition: str) -> dict[str, float]:
    """Return the sum over all labels of each sample in Prometheus' text format."""
    totals: dict[str, float] = {}
    for line in exposition.splitlines():
        match = _SAMPLE.match(line)
        if match is not None:
            totals[match[1]] = totals.get(match[1], 0.0) + float(match[2])
    return totals


def why_not_ready(status: Mapping[str, Any]) -> list[Finding]:
    """Return what keeps a model from answering at once.

    Args:
        status: the response to GET /v1/status.
    """
    findings = []
    if status["failure"]:
        findings.append(
            Finding(
                "sandboxes",
                str(status["failure"]),
                "the log of `faasmoe up` has the sandboxes' own lines ([sandboxes])",
            )
        )
    if status["followers"] == 0:
        findings.append(
            Finding(
                "router",
                "no router follows the routing table",
                "it starts, ends (`router.scaling`) or is restarted: see [router] in the log",
            )
        )
    waiting = [f for f in status["functions"] if f["ready"] < f["desired"]]
    if waiting:
        size = sum(f["size_bytes"] for f in waiting) / 1e9
        findings.append(
            Finding(
                "activation",
                f"{len(waiting)} of {len(status['functions'])} functions are being attached, "
                f"{size:.1f} GB",
                "a warm sandbox makes that an mmap: `experts.warmPool`; `experts.memory` may be "
                "too small for all of them",
            )
        )
    if status["held"] and not waiting:
        findings.append(
            Finding(
                "activation",
                f"{status['held']} requests wait for functions",
                "they have just become ready, or `experts.memory` holds no more",
            )
        )
    return findings


def step_times(totals: Mapping[str, float]) -> list[StepTime]:
    """Return what requests took in each step, in the order of the steps.

    Args:
        totals: samples of the router's metrics.
    """
    n = totals.get("vllm:e2e_request_latency_seconds_count", 0.0)
    if not n:
        return []
    sums_s = {
        "activation": totals.get("faasmoe_router_cold_start_seconds_sum", 0.0),
        **{
            step: totals.get(f"vllm:request_{step}_time_seconds_sum", 0.0)
            for step in ("queue", "prefill", "decode")
        },
    }
    total_s = sum(sums_s.values()) or 1.0
    return [StepTime(name, sum_s / n, sum_s / total_s) for name, sum_s in sums_s.items()]


CHANGES = {
    "activation": "keep functions: `experts.scaling.minScale: 1`, or longer: `windowSeconds`, "
    "`scaleDownDelaySeconds`; start them faster: `experts.warmPool`",
    "queue": "more at once: `router.maxNumSeqs` (and `kvCacheMemory`); a tenant's `weight`; more "
    "routers",
    "prefill": "smaller weights: `experts.quantization`, `router.quantization`; prompts that begin "
    "alike are cached; `router.maxNumBatchedTokens`",
    "decode": "smaller weights: `experts.quantization: int8` or `int4`; fewer, larger functions: "
    "`granularity.expertsPerFunction`; more cores, `experts.threads`",
}


def why_slow(totals: Mapping[str, float]) -> list[Finding]:
    """Return where requests spend their time, and what is unusual about it.

    Args:
        totals: samples of the router's metrics.
    """
    times = step_times(totals)
    findings = [
        Finding(
            step.name,
            f"{step.mean_s:.2f} s of a request on average, {100 * step.share:.0f} % of its time",
            CHANGES[step.name],
        )
        for step in sorted(times, key=lambda t: -t.share)
        if step.share >= NOTABLE_SHARE
    ]
    return findings + _unusual_calls(totals) + _unusual_cache(totals)


def _unusual_calls(totals: Mapping[str, float]) -> list[Finding]:
    calls = totals.get("faasmoe_router_function_calls_total", 0.0)
    failures = totals.get("faasmoe_router_function_call_failures_total", 0.0)
    local = totals.get("faasmoe_router_local_computations_total", 0.0)
    findings = []
    if calls and failures / calls >= NOTABLE_FAILURES:
        findings.append(
            Finding(
                "functions",
                f"{100 * failures / calls:.1f} % of calls to functions have failed",
                "sandboxes die or are too slow: see [sandboxes] in the log, docs/faults.md",
            )
        )
    if calls and local / calls >= NOTABLE_FAILURES:
        findings.append(
            Finding(
                "functions",
                f"{local:.0f} calls were computed in the router, as no sandbox answered",
                "functions that are lost again and again: see [sandboxes] in the log",
            )
        )
    return findings


def _unusual_cache(totals: Mapping[str, float]) -> list[Finding]:
    findings = []
    if (used := totals.get("vllm:kv_cache_usage_perc", 0.0)) >= FULL_CACHE:
        findings.append(
            Finding("KV cache", f"{100 * used:.0f} % is taken", "`router.kvCacheMemory`")
        )
    if preemptions := totals.get("vllm:num_preemptions_total", 0.0):
        findings.append(
            Finding(
                "queue",
                f"requests gave up their place {preemptions:.0f} times",
                "tenants share the batch by `weight`; `router.maxNumSeqs` gives them more of it",
            )
        )
    return findings


def render(
    model: str,
    status: Mapping[str, Any],
    totals: Mapping[str, float] | None,
    *,
    note: str = "",
) -> str:
    """Return what there is to say of a model.

    Args:
        model: its name.
        status: the response to GET /v1/status.
        totals: samples of its router's metrics; None if they cannot be had.
        note: why not.
    """
    not_ready = why_not_ready(status)
    active = sum(f["ready"] > 0 for f in status["functions"])
    functions = f"{active} of {len(status['functions'])} functions are active"
    lines = [f"{model}: {'not ready' if not_ready else 'ready'}; {functions}"]
    lines += _section(not_ready)
    if totals is None:
        return "\n".join([*lines, f"Times are unknown: {note}"])
    times = step_times(totals)
    if not times:
        return "\n".join([*lines, "No request has been answered since the router started."])
    n = totals["vllm:e2e_request_latency_seconds_count"]
    first = _mean(totals, "vllm:time_to_first_token_seconds")
    token = _mean(totals, "vllm:request_time_per_output_token_seconds")
    lines.append(f"{n:.0f} requests; first token {first:.2f} s, then {1e3 * token:.1f} ms a token")
    lines += [f"  {t.name:<10} {t.mean_s:8.3f} s  {100 * t.share:3.0f} %" for t in times]
    return "\n".join([*lines, *_section(why_slow(totals))])


def _mean(totals: Mapping[str, float], name: str) -> float:
    return totals.get(f"{name}_sum", 0.0) / max(1.0, totals.get(f"{name}_count", 0.0))


def _section(findings: Sequence[Finding]) -> list[str]:
    return [f"  {line}" for finding in findings for line in str(finding).splitlines()]
