"""`python -m benchmarks.seen`: what tracing and the live page cost, in tokens per second.

Runs three `faasmoe up` of one model side by side: plain, traced at the default sampling to a
collector of this process, and with the live page that one viewer watches. Each round sends the same
streams to one after the other; ratios are of neighbouring turns, in which the machine was equally
fast, and the order changes from round to round. Writes benchmarks/out/seen.json.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import yaml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "integration"))

from benchmarks.report import describe_machine, write_figures  # noqa: E402
from faasmoe_up import FaasmoeUp, running_up  # noqa: E402
from otlp_collector import running_collector  # noqa: E402

PLAIN, TRACED, PAGE = "plain", "traced", "page"
PROMPT = "The history of the town begins"
TIMEOUT_S = 600.0
KEEP_FUNCTIONS = {"scaling": {"minScale": 1}}  # cold starts are not what is measured


def main() -> int:
    """Measure all three in turns; print and write the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.seen", description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / ".faasmoe" / "demo-model")
    parser.add_argument("--rounds", type=int, default=12, help="default: %(default)s")
    parser.add_argument("--streams", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--trace-ratio", type=float, default=0.01, help="default: %(default)s")
    arguments = parser.parse_args()
    if not arguments.model.is_dir():
        parser.error(f"--model: {arguments.model} is no folder; `faasmoe demo-model` makes one")
    figures = {"machine": describe_machine(), **measure(arguments)}
    path = write_figures("seen", figures, folder=ROOT / "benchmarks" / "out")
    for name in ("tracing_cost", "page_cost"):
        print(f"{name}: {figures[name]:.4f} {figures[f'{name}_spread']}")
    print(f"figures: {path}")
    return 0


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of all rounds."""
    with tempfile.TemporaryDirectory(prefix="seen-") as name, ExitStack() as stack:
        folder = Path(name)
        collector = stack.enter_context(running_collector())
        ratio = str(arguments.trace_ratio)
        options = {
            PLAIN: ("--no-live-page",),
            TRACED: (
                *("--no-live-page", "--otlp-endpoint", collector.url, "--trace-ratio", ratio),
            ),
            PAGE: (),
        }
        ups = {
            kind: stack.enter_context(
                running_up(write_moemodel(folder, kind, arguments.model), folder / kind, *words)
            )
            for kind, words in options.items()
        }
        rates = asyncio.run(run_rounds(ups, arguments))
        return {
            "streams": arguments.streams,
            "tokens": arguments.tokens,
            "trace_ratio": arguments.trace_ratio,
            "spans": len(collector.spans),
            "tokens_per_s": rates,
            **cost("tracing_cost", rates[PLAIN], rates[TRACED]),
            **cost("page_cost", rates[PLAIN], rates[PAGE]),
        }


def write_moemodel(folder: Path, kind: str, model: Path) -> Path:
    """Write the MoEModel of one server, with a store of its own beside it."""
    document = {
        "apiVersion": "faasmoe.dev/v1alpha1",
        "kind": "MoEModel",
        "metadata": {"name": kind},
        "spec": {
            "model": {"source": f"file://{model.resolve()}"},
            "store": {"path": str(folder / f"{kind}-store")},
            "experts": KEEP_FUNCTIONS,
        },
    }
    path = folder / f"{kind}.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


async def run_rounds(
    ups: Mapping[str, FaasmoeUp], arguments: argparse.Namespace
) -> dict[str, list[float]]:
    """Return the tokens per second of each server in each round."""
    rates: dict[str, list[float]] = {kind: [] for kind in ups}
    async with httpx.AsyncClient(timeout=TIMEOUT_S, trust_env=False) as client:
        viewer = asyncio.create_task(watch(client, ups[PAGE]))
        try:
            for kind, up in ups.items():
                await generate(client, kind, up, arguments)  # warms it up
            for number in range(arguments.rounds):
                for kind in turn_order(list(ups), number):
                    rates[kind].append(await generate(client, kind, ups[kind], arguments))
                if viewer.done():
                    viewer.result()
                print(f"round {number}: " + ", ".join(f"{k} {v[-1]:.1f}" for k, v in rates.items()))
        finally:
            viewer.cancel()
            await asyncio.gather(viewer, return_exceptions=True)
    return rates


def turn_order(kinds: Sequence[str], number: int) -> list[str]:
    """Return the order of a round: each comes first, in the middle and last equally often."""
    first = number % len(kinds)
    order = [*kinds[first:], *kinds[:first]]
    return order[::-1] if (number // len(kinds)) % 2 else order


async def watch(client: httpx.AsyncClient, up: FaasmoeUp) -> None:
    """Watch the live page until cancelled."""
    url = f"{up.base_url}/ui/events?model={PAGE}"
    async with client.stream("GET", url) as response:
        response.raise_for_status()
        async for _ in response.aiter_bytes():
            pass
    raise RuntimeError("the live page's stream has ended")


async def generate(
    client: httpx.AsyncClient, kind: str, up: FaasmoeUp, arguments: argparse.Namespace
) -> float:
    """Send the streams at once; return their tokens per second."""
    body = {
        "model": kind,
        "prompt": PROMPT,
        "max_tokens": arguments.tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }
    started_s = time.monotonic()
    await asyncio.gather(*(read(client, up, body) for _ in range(arguments.streams)))
    n_tokens = int(arguments.streams) * int(arguments.tokens)
    return n_tokens / (time.monotonic() - started_s)


async def read(client: httpx.AsyncClient, up: FaasmoeUp, body: Mapping[str, Any]) -> None:
    """Read one stream to its end."""
    async with client.stream("POST", f"{up.base_url}/v1/completions", json=body) as response:
        response.raise_for_status()
        async for _ in response.aiter_bytes():
            pass


def cost(name: str, plain: Sequence[float], other: Sequence[float]) -> dict[str, Any]:
    """Return what something costs as a part of 1: the median over the rounds, and quartiles."""
    costs = sorted(1 - b / a for a, b in zip(plain, other, strict=True))
    quartiles = statistics.quantiles(costs, n=4) if len(costs) > 1 else [costs[0]] * 3
    return {
        name: round(statistics.median(costs), 4),
        f"{name}_spread": [round(quartiles[0], 4), round(quartiles[2], 4)],
    }


if __name__ == "__main__":
    sys.exit(main())
