"""One visit: a server is started, asked everything, measured and stopped."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.peers.client import WorkloadResult, greedy_tokens, run_workload
from benchmarks.peers.machine_load import MachineLoad
from benchmarks.peers.models import vocabulary
from benchmarks.peers.servers import PeerServer, RunningServer, cpu_used_s
from benchmarks.peers.workload import (
    Workload,
    check_workload,
    decode_workload,
    prompt_workload,
    warm_up_workload,
)

BF16 = "bf16"


@dataclass(frozen=True, slots=True)
class VisitPlan:
    """What each visit asks.

    Attributes:
        concurrency: numbers of requests in flight at which tokens are generated.
        ttft_concurrency: the same for the time to first token of long prompts.
        is_quick: whether batch 1 has half of the requests.
        rest_s: idle time after which memory at rest is measured; 0 for not.
    """

    concurrency: tuple[int, ...]
    ttft_concurrency: tuple[int, ...]
    is_quick: bool
    rest_s: float = 0.0


@dataclass(frozen=True, slots=True)
class BatchFigures:
    """The figures of one visit at one concurrency.

    Attributes:
        tokens_per_s: generated tokens per second, the time of their prompts included.
        short_ttft_ms: median time to first token of these requests, which arrive together.
        tpot_ms: median time between tokens.
        cpu_ms_per_token: CPU time of all processes per generated token.
        ttft_ms: median time to first token of the long prompts; None if not asked.
    """

    tokens_per_s: float
    short_ttft_ms: float
    tpot_ms: float
    cpu_ms_per_token: float
    ttft_ms: float | None


@dataclass(frozen=True, slots=True)
class Visit:
    """The result of one visit.

    Attributes:
        start_s: time from the start of the first process to the first token of the first request.
        pss_bytes: memory of all processes after the last request.
        batches: figures by concurrency.
        tokens: greedy tokens of the check's prompts; only in bf16.
        other_cores: cores that other processes of the machine used meanwhile; the figures mean
            nothing unless it is about zero.
        details: version and settings of the server.
        rest_pss_bytes: memory of all processes after an idle time; None if not asked.
    """

    start_s: float
    pss_bytes: int
    batches: Mapping[int, BatchFigures]
    tokens: tuple[tuple[str, ...], ...]
    other_cores: float = 0.0
    details: Mapping[str, Any] = field(default_factory=dict)
    rest_pss_bytes: int | None = None


async def visit(
    server: PeerServer, model: str, precision: str, plan: VisitPlan, round_number: int
) -> Visit:
    """Start a server, measure it and stop it."""
    size = vocabulary(model)
    started_s = time.perf_counter()
    async with server.run(model, precision) as running:
        first = await _run(running, warm_up_workload(1, vocabulary=size, round_number=round_number))
        start_s = time.perf_counter() - started_s - first.time_s + first.responses[0].ttft_s
        tokens: tuple[tuple[str, ...], ...] = ()
        if precision == BF16:
            tokens = await greedy_tokens(
                running.url, running.model, check_workload(vocabulary=size)
            )
        load = MachineLoad(running)
        batches = {
            c: await _measure(running, c, size, plan, round_number) for c in plan.concurrency
        }
        others = load.other_cores()
        warm, rest = running.pss_bytes(), None
        if plan.rest_s:
            await asyncio.sleep(plan.rest_s)
            rest = running.pss_bytes()
        return Visit(start_s, warm, batches, tokens, others, running.details, rest)


async def _measure(
    running: RunningServer, concurrency: int, size: int, plan: VisitPlan, round_number: int
) -> BatchFigures:
    await _run(running, warm_up_workload(concurrency, vocabulary=size, round_number=round_number))
    before = running.read_cpu_s()
    decode = await _run(
        running,
        decode_workload(
            concurrency, vocabulary=size, round_number=round_number, is_quick=plan.is_quick
        ),
    )
    cpu_s = cpu_used_s(before, running.read_cpu_s())
    long_ttft_ms = None
    if concurrency in plan.ttft_concurrency:
        long = prompt_workload(concurrency, vocabulary=size, round_number=round_number)
        long_ttft_ms = (await _run(running, long)).ttft_ms
    assert decode.tpot_ms is not None  # several tokens each
    return BatchFigures(
        tokens_per_s=decode.tokens_per_s,
        short_ttft_ms=decode.ttft_ms,
        tpot_ms=decode.tpot_ms,
        cpu_ms_per_token=cpu_s / decode.n_tokens * 1e3,
        ttft_ms=long_ttft_ms,
    )


async def _run(running: RunningServer, workload: Workload) -> WorkloadResult:
    return await run_workload(running.url, running.model, workload)
