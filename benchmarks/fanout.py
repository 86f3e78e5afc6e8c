"""Benchmarks the hot path's server and client: one call each to 3 servers, 4 KB to 1 MB each way.

`python -m benchmarks.fanout [--quick] [--product-only]`. The candidates alternate over several
rounds; each figure is the median over the rounds, with minimum and maximum. The choice and its
reasons are in docs/performance.md.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.echo_servers import (
    ASYNCIO,
    FRAMES,
    UNIX,
    UNIX_FRAMES,
    UVICORN,
    UVLOOP,
    RunningServers,
    ServerKind,
    forked_servers,
)
from benchmarks.fanout_clients import (
    AiohttpClient,
    FanoutBenchmarkClient,
    FanoutClient,
    FrameClient,
    InLoopClient,
    ProtocolClient,
    new_uvloop,
    running_loop_thread,
)
from benchmarks.report import OUT, Spread, describe_machine, percentile, write_figures

from faasmoe_operator.cli.formatting import format_table

SERVERS = 3
SIZES = (8 << 10, 64 << 10, 256 << 10, 1 << 20)
PRODUCT_SIZE = 64 << 10
WARM_FANOUTS = 5
NEVER_SHARED_BYTES = 1 << 40


@dataclass(frozen=True, slots=True)
class Candidate:
    """A server and a client, with the names that the table shows."""

    server: str
    name: str
    client: FanoutBenchmarkClient


@dataclass(frozen=True, slots=True)
class FanoutTiming:
    """One candidate's measurement at one size, in µs."""

    p50_us: float
    p99_us: float
    cpu_us_per_call: float


Timings = Mapping[tuple[int, int], Sequence[FanoutTiming]]
"""By body size and the candidate's position."""


@contextmanager
def running_candidates(*, product_only: bool) -> Iterator[list[Candidate]]:
    """Yield the candidates, with running servers and open connections.

    The first two are the product's path on one machine and between machines, the next two the same
    without the wire format, then two on one machine with frames that are never, or always, passed
    in shared memory.
    """
    kinds = [UNIX_FRAMES, FRAMES, UNIX, UVLOOP]
    if not product_only:
        kinds += [UVICORN, ASYNCIO]
    with ExitStack() as stack:
        # Fork all processes before starting a thread: a fork copies only the forking thread.
        servers = {kind: stack.enter_context(forked_servers(kind, SERVERS)) for kind in kinds}
        candidates = []
        for kind in kinds[:2]:
            frames = stack.enter_context(closing(FrameClient(servers[kind])))
            candidates.append(Candidate(kind.name, "ours, polled sockets, wire frames", frames))
        for kind in kinds[2:4]:
            bare = stack.enter_context(closing(FanoutClient(servers[kind])))
            candidates.append(Candidate(kind.name, "ours, polled sockets", bare))
        for name, min_shared_bytes in (("never shared", NEVER_SHARED_BYTES), ("always shared", 0)):
            client = FrameClient(servers[UNIX_FRAMES], min_shared_bytes=min_shared_bytes)
            frames = stack.enter_context(closing(client))
            candidates.append(Candidate(UNIX_FRAMES.name, f"ours, wire frames, {name}", frames))
        yield candidates if product_only else candidates + _other_candidates(stack, servers)


def _other_candidates(
    stack: ExitStack, servers: Mapping[ServerKind, RunningServers]
) -> list[Candidate]:
    fast_loop = stack.enter_context(running_loop_thread(new_uvloop))
    loop = stack.enter_context(running_loop_thread(asyncio.new_event_loop))
    candidates = []
    aiohttp = stack.enter_context(closing(AiohttpClient(fast_loop, servers[UVICORN].addresses)))
    candidates.append(Candidate(UVICORN.name, "aiohttp on uvloop, from a thread", aiohttp))
    candidates.append(
        Candidate(UVICORN.name, "aiohttp on uvloop, in its loop", InLoopClient(aiohttp))
    )
    for kind, own_loop, name in ((ASYNCIO, loop, "asyncio"), (UVLOOP, fast_loop, "uvloop")):
        protocol = stack.enter_context(closing(ProtocolClient(own_loop, servers[kind].addresses)))
        candidates.append(Candidate(kind.name, f"Protocol on {name}, from a thread", protocol))
    fanout = stack.enter_context(closing(FanoutClient(servers[ASYNCIO])))
    candidates.append(Candidate(ASYNCIO.name, "ours, polled sockets", fanout))
    return candidates


def measure(
    candidates: Sequence[Candidate], sizes: Sequence[int], *, rounds: int, n_fanouts: int
) -> Timings:
    """Measure the candidates alternately.

    Args:
        candidates: the candidates.
        sizes: body sizes in bytes.
        rounds: measurements of each candidate at each size.
        n_fanouts: fan-outs in a measurement at 64 KB and less; larger bodies get fewer.
    """
    for candidate in candidates:
        _check_echo(candidate.client)
    timings: dict[tuple[int, int], list[FanoutTiming]] = {}
    for _ in range(rounds):
        for size_bytes in sizes:
            n = max(3, n_fanouts * PRODUCT_SIZE // max(size_bytes, PRODUCT_SIZE))
            for position, candidate in enumerate(candidates):
                timing = measure_candidate(candidate.client, size_bytes, n)
                timings.setdefault((size_bytes, position), []).append(timing)
    return timings


def measure_candidate(
    client: FanoutBenchmarkClient, size_bytes: int, n_fanouts: int
) -> FanoutTiming:
    """Measure one client at one body size."""
    bodies = [os.urandom(size_bytes) for _ in range(SERVERS)]
    client.time_s(bodies, WARM_FANOUTS)
    cpu_started_s = time.process_time()
    times_s = client.time_s(bodies, n_fanouts)
    cpu_s = time.process_time() - cpu_started_s
    return FanoutTiming(
        percentile(times_s, 50) * 1e6,
        percentile(times_s, 99) * 1e6,
        cpu_s / (n_fanouts * SERVERS) * 1e6,
    )


def _check_echo(client: FanoutBenchmarkClient) -> None:
    bodies = [os.urandom(PRODUCT_SIZE) for _ in range(SERVERS)]
    if client.post(bodies) != bodies:
        raise RuntimeError(f"{type(client).__name__}: a response differs from its request")


def spread_by_figure(timings: Sequence[FanoutTiming]) -> dict[str, Spread]:
    """Return the spread of each figure over the rounds."""
    values = [asdict(timing) for timing in timings]
    return {name: Spread.from_values([value[name] for value in values]) for name in values[0]}


def format_timings(candidates: Sequence[Candidate], timings: Timings) -> str:
    """Format a table of medians over the rounds, with minimum and maximum."""
    header = ("BODY", "SERVER", "CLIENT", "P50 µs", "P99 µs", "CLIENT CPU µs/CALL")
    rows = []
    for (size_bytes, position), rounds in sorted(timings.items()):
        candidate, figures = candidates[position], spread_by_figure(rounds)
        cells = (spread.format() for spread in figures.values())
        rows.append((f"{size_bytes >> 10} KB", candidate.server, candidate.name, *cells))
    return format_table(header, rows)


def build_figures(candidates: Sequence[Candidate], timings: Timings) -> dict[str, Any]:
    """Return the content of fanout.json."""
    return {
        "fanout_p50_us": spread_by_figure(timings[PRODUCT_SIZE, 0])["p50_us"].median,
        "fanout_tcp_p50_us": spread_by_figure(timings[PRODUCT_SIZE, 1])["p50_us"].median,
        "fanout_without_frames_p50_us": spread_by_figure(timings[PRODUCT_SIZE, 2])["p50_us"].median,
        "servers": SERVERS,
        "candidates": [
            {
                "body_bytes": size_bytes,
                "server": candidates[position].server,
                "client": candidates[position].name,
                **spread_by_figure(rounds),
            }
            for (size_bytes, position), rounds in sorted(timings.items())
        ],
    }


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fanout")
    parser.add_argument("--quick", action="store_true", help="few calls, as a smoke test")
    parser.add_argument("--product-only", action="store_true", help="only our path, at 64 KB")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for figures (%(default)s)")
    arguments = parser.parse_args()
    machine = describe_machine()
    rounds, n_fanouts = (2, 20) if arguments.quick else (7, 400)
    sizes = (PRODUCT_SIZE,) if arguments.product_only else SIZES
    with running_candidates(product_only=arguments.product_only) as candidates:
        timings = measure(candidates, sizes, rounds=rounds, n_fanouts=n_fanouts)
        print(f"fan-out to {SERVERS} servers, round trip of the whole; median (least..most)")
        print(format_timings(candidates, timings))
        figures = {"machine": machine, **build_figures(candidates, timings)}
    print(f"figures: {write_figures('fanout', figures, folder=arguments.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
