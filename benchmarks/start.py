"""Start and stop of `faasmoe up`: time to the first token of a first request, and where it goes.

`python -m benchmarks.start [--repeats N]` serves the demo model of `make demo`, prepared, and sends
one streamed chat as soon as the router is healthy. The phases of each process are those in its own
log line (`faasmoe_contracts.start_phases`); times since the start of `faasmoe up` are seen from
outside. docs/performance.md has the results.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from asyncio.subprocess import DEVNULL, PIPE, STDOUT
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from benchmarks.report import OUT, Spread, describe_machine, write_figures
from benchmarks.server_process import free_port
from benchmarks.worker import ROOT

from faasmoe_contracts.start_phases import parse_start_phases

CLI = (sys.executable, "-m", "faasmoe_operator.cli")
DEMO = ROOT / ".faasmoe"
MOEMODEL = ROOT / "examples" / "demo.yaml"
QUESTION = "What is the capital of France? Answer in one sentence."
POLL_S = 0.01
TIMEOUT_S = 120.0
REPEATS = 5
SUMMARY = "OpenAI base URL"  # in the last message of the start of `faasmoe up`

EVENTS = {
    "faasmoe: verifying": "launcher checked model and store",
    "faasmoe: starting": "launcher starts the processes",
    "warmed up": "zygote is warm",
    "control listens": "control process listens",
    "listening on": "first sandbox listens",
    SUMMARY: "launcher prints the summary",
}


@dataclass(slots=True)
class StartRun:
    """One start, request and stop.

    Attributes:
        events_s: seconds since `faasmoe up` was executed, by event.
        phases_s: seconds of each phase, by process.
        stop_s: seconds from SIGTERM to the exit.
    """

    events_s: dict[str, float] = field(default_factory=dict)
    phases_s: dict[str, Mapping[str, float]] = field(default_factory=dict)
    stop_s: float = 0.0


async def measure_start(moemodel: Path) -> StartRun:
    """Start `faasmoe up`, stream the first chat as soon as possible and stop."""
    run, port, serving = StartRun(), free_port(), asyncio.Event()
    with tempfile.TemporaryDirectory(prefix="faasmoe-bench-") as folder:
        started_s = time.monotonic()
        process = await asyncio.create_subprocess_exec(
            *(*CLI, "up", "-f", str(moemodel), "--port", str(port)),
            stdin=DEVNULL,
            stdout=PIPE,
            stderr=STDOUT,
            cwd=ROOT,
            env={**os.environ, "XDG_RUNTIME_DIR": folder},
        )

        def record(event: str) -> None:
            run.events_s.setdefault(event, time.monotonic() - started_s)
            if event == EVENTS[SUMMARY]:
                serving.set()

        assert process.stdout is not None
        reader = asyncio.create_task(_read_log(process.stdout, run, record))
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await _request_first_token(f"http://127.0.0.1:{port}", process, record)
                await serving.wait()
        finally:
            stopped_s = time.monotonic()
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
            await process.wait()
            run.stop_s = time.monotonic() - stopped_s
            await reader
    return run


async def _read_log(
    lines: AsyncIterator[bytes], run: StartRun, record: Callable[[str], None]
) -> None:
    async for raw in lines:
        line = raw.decode(errors="replace")
        phases = parse_start_phases(line)
        if phases is not None:
            run.phases_s.setdefault(line[1 : line.index("]")], phases)
        for text, event in EVENTS.items():
            if text in line and phases is None:
                record(event)


async def _request_first_token(
    url: str, process: asyncio.subprocess.Process, record: Callable[[str], None]
) -> None:
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 8,
        "temperature": 0,
        "stream": True,
    }
    async with aiohttp.ClientSession() as http:
        while not await _is_healthy(http, url):
            if process.returncode is not None:
                raise RuntimeError(f"faasmoe up ended with status {process.returncode}")
            await asyncio.sleep(POLL_S)
        record("router is healthy")
        async with http.post(f"{url}/v1/chat/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.content:
                if b'"content":"' in line and b'"content":""' not in line:
                    record("first token")
            record("response complete")


async def _is_healthy(http: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with http.get(f"{url}/health") as response:
            return response.status == 200
    except aiohttp.ClientError:
        return False


def prepare_demo() -> None:
    """Make the demo model and its store if they do not exist."""
    if not (DEMO / "demo-model" / "config.json").exists():
        subprocess.run([*CLI, "demo-model", str(DEMO / "demo-model")], check=True)
    if not (DEMO / "demo-store" / "manifest.json").exists():
        source = str(DEMO / "demo-model")
        subprocess.run([*CLI, "prepare", source, str(DEMO / "demo-store")], check=True)


def summarize(runs: Sequence[StartRun]) -> dict[str, Any]:
    """Return medians with minimum and maximum over all runs."""
    return {
        "start_to_first_token_s": Spread.from_values([r.events_s["first token"] for r in runs]),
        "stop_s": Spread.from_values([r.stop_s for r in runs]),
        "events_s": {
            event: Spread.from_values([r.events_s[event] for r in runs])
            for event in sorted(runs[0].events_s, key=lambda event: runs[0].events_s[event])
            if all(event in r.events_s for r in runs)
        },
        "phases_s": {
            process: {
                phase: Spread.from_values([r.phases_s[process][phase] for r in runs])
                for phase in phases
            }
            for process, phases in runs[0].phases_s.items()
        },
        "repeats": len(runs),
    }


def format_figures(figures: Mapping[str, Any]) -> str:
    """Return the time line and the phases as text."""
    lines = [f"{spread.format(2):>20} s  {event}" for event, spread in figures["events_s"].items()]
    lines.append(f"{figures['stop_s'].format(2):>20} s  from SIGTERM to the exit")
    for process, phases in figures["phases_s"].items():
        durations = ", ".join(f"{name} {spread.median:.2f}" for name, spread in phases.items())
        lines.append(f"{process}: {durations} s")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--repeats", type=int, default=REPEATS, help="starts to measure (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=OUT, help="folder of start.json")
    arguments = parser.parse_args()
    prepare_demo()
    machine, runs = describe_machine(), []
    for number in range(arguments.repeats + 1):  # the first one fills the page cache
        run = asyncio.run(measure_start(MOEMODEL))
        print(f"start {number}: {run.events_s['first token']:.2f} s, stop {run.stop_s:.2f} s")
        runs.append(run)
    figures = summarize(runs[1:])
    print(format_figures(figures))
    path = write_figures("start", {"machine": machine, **figures}, folder=arguments.out)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
