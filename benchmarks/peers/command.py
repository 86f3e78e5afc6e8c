"""Our `faasmoe up` beside llama.cpp's server, and vLLM on the CPU, in one run: the yardstick.

`faasmoe bench peers`, which a user runs, or `python -m benchmarks.peers [--quick]`, which has other
defaults. One server at a time, in turns, with the same checkpoint, prompts, lengths and number of
threads. docs/performance.md has the method and the results.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.elastic import CACHE
from benchmarks.peers import comparison
from benchmarks.peers.comparison import OURS, OURS_VLLM, PEER, VLLM, Cell
from benchmarks.peers.environments import (
    make_llama_environment,
    make_vllm_engine_environment,
    make_vllm_environment,
)
from benchmarks.peers.faasmoe_server import LONG_WINDOW_S, FaasmoeServer
from benchmarks.peers.gguf_files import GGUF_NAMES
from benchmarks.peers.llama_server import LlamaServer, binary_version
from benchmarks.peers.models import DEMO_CHECKPOINT, GEOMETRIES
from benchmarks.peers.servers import NotServedError, PeerServer
from benchmarks.peers.tables import overview_table, ratio_table, server_table
from benchmarks.peers.visit import Visit, VisitPlan, visit
from benchmarks.peers.vllm_server import VllmServer
from benchmarks.report import OUT, describe_machine, write_figures
from benchmarks.worker import ROOT

BINARY_VARIABLE = "LLAMA_SERVER"
VENV_VARIABLE = "PEERS_VENV"
TENANTS = 6
REST_S = 40.0
SERVERS = {"faasmoe": OURS, "llama": PEER, "vllm": VLLM, "faasmoe-vllm": OURS_VLLM}


@dataclass(frozen=True, slots=True)
class Defaults:
    """What is not given on the command line.

    Attributes:
        models: the checkpoints.
        precisions: of the weights.
        concurrency: requests in flight.
        rounds: visits of each server.
        rest_s: idle time after which memory at rest is measured; 0 for not.
    """

    models: tuple[str, ...] = ("qwen", "demo")
    precisions: tuple[str, ...] = ("bf16", "int8", "int4")
    concurrency: tuple[int, ...] = (1, 8, 32)
    rounds: int = 3
    rest_s: float = 0.0


FOR_USERS = Defaults(("qwen",), ("int8",), (1, TENANTS), rounds=1, rest_s=REST_S)
"""One checkpoint, idle and with six tenants."""


def add_command(commands: Any) -> None:
    """Add `faasmoe bench peers`."""
    parser = commands.add_parser(
        "peers",
        help="compare with llama.cpp's server, and vLLM on the CPU",
        description="Serve one checkpoint with FaaSMoE, llama.cpp's server and, with --vllm, vLLM\n"
        "in turns, and compare tokens/s and first token of one client and of six, and\n"
        "memory warm and at rest. GB-seconds of a day are added from day.json beside --out\n"
        "(faasmoe bench day). The peers are installed with pip below --cache.",
        epilog="Examples:\n  faasmoe bench peers\n  faasmoe bench peers --precisions bf16 --vllm",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser, FOR_USERS)
    parser.set_defaults(run=lambda arguments: measure(complete(arguments, FOR_USERS)))


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line of `python -m benchmarks.peers`; `--quick` sets what is not given."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser, Defaults())
    return complete(parser.parse_args(words), Defaults())


def add_options(parser: argparse.ArgumentParser, defaults: Defaults) -> None:
    """Add the options; those without a default of their own get one in `complete`."""
    models, precisions = ",".join(defaults.models), ",".join(defaults.precisions)
    concurrency = ",".join(map(str, defaults.concurrency))
    parser.add_argument("--quick", action="store_true", help="one round of what matters, 2 minutes")
    parser.add_argument(
        "--models", type=_names(*GEOMETRIES, DEMO_CHECKPOINT), help=f"default: {models}"
    )
    parser.add_argument(
        "--precisions",
        type=_names(*GGUF_NAMES),
        help=f"default: {precisions}; quick: without int4",
    )
    parser.add_argument("--servers", type=_names(*SERVERS), default=("faasmoe", "llama"))
    parser.add_argument("--vllm", action="store_true", help="add vLLM to the servers")
    parser.add_argument(
        "--vllm-engine",
        action="store_true",
        help="add vLLM and our router with vLLM's engine to the servers",
    )
    parser.add_argument(
        "--vllm-dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="that vLLM computes in, and our router with vLLM's engine",
    )
    parser.add_argument(
        "--vllm-compiled",
        action="store_true",
        help="compile in vLLM, and in our router with it; the first start takes minutes",
    )
    parser.add_argument(
        "--vllm-python", type=Path, help="environment with vLLM and our router; made if omitted"
    )
    parser.add_argument("--concurrency", type=_numbers, help=f"default: {concurrency}; quick: two")
    parser.add_argument(
        "--ttft-concurrency",
        type=_numbers,
        help=f"for long prompts; default: {concurrency}; quick: 1",
    )
    parser.add_argument("--rounds", type=int, help=f"default: {defaults.rounds}; quick: 1")
    parser.add_argument(
        "--rest",
        type=float,
        default=defaults.rest_s,
        metavar="S",
        help="measure memory after so many idle seconds, in which our functions go to zero; 0 for "
        "not, and functions that stay (default: %(default)g)",
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--functions-per-layer", type=int, default=3, help="ours")
    parser.add_argument("--sandboxes", type=int, default=3, help="ours")
    parser.add_argument("--router-dtype", default="auto", help="ours: router.dtype")
    parser.add_argument("--cache", type=Path, default=CACHE / "peers", help="models, environments")
    parser.add_argument(
        "--peers-venv",
        type=Path,
        default=os.environ.get(VENV_VARIABLE),
        help=f"environment with xllamacpp (${VENV_VARIABLE}); made below --cache if omitted",
    )
    parser.add_argument(
        "--llama-server",
        type=Path,
        default=os.environ.get(BINARY_VARIABLE),
        help=f"llama-server binary (${BINARY_VARIABLE}) in place of xllamacpp",
    )
    parser.add_argument("--out", type=Path, default=OUT, help="folder of peers.json")


def complete(arguments: argparse.Namespace, defaults: Defaults) -> argparse.Namespace:
    """Set what is not given."""
    quick = arguments.quick
    arguments.models = arguments.models or defaults.models
    arguments.precisions = arguments.precisions or tuple(
        name for name in defaults.precisions if not (quick and name == "int4")
    )
    arguments.concurrency = arguments.concurrency or (
        defaults.concurrency[:2] if quick else defaults.concurrency
    )
    arguments.ttft_concurrency = arguments.ttft_concurrency or (
        (1,) if quick else arguments.concurrency
    )
    arguments.rounds = arguments.rounds or (1 if quick else defaults.rounds)
    if arguments.vllm or arguments.vllm_engine:
        arguments.servers = (*arguments.servers, "vllm")
    if arguments.vllm_engine:
        arguments.servers = (*arguments.servers, "faasmoe-vllm")
    return arguments


def _names(*known: str) -> Any:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        if unknown := set(names) - set(known):
            raise argparse.ArgumentTypeError(
                f"got {', '.join(sorted(unknown))}, expected some of {', '.join(known)}"
            )
        return names

    return parse


def _numbers(text: str) -> tuple[int, ...]:
    numbers = tuple(map(int, text.split(",")))
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected numbers from 1")
    return numbers


def make_servers(arguments: argparse.Namespace) -> list[PeerServer]:
    """Return the servers of the run; makes their environments."""
    folder, parallel = arguments.cache, max(arguments.concurrency)
    layout = (arguments.functions_per_layer, arguments.sandboxes)
    window_s = round(arguments.rest / 2) if arguments.rest else LONG_WINDOW_S
    servers: list[PeerServer] = []
    for name in dict.fromkeys(arguments.servers):
        if name == "faasmoe":
            dtype = arguments.router_dtype
            servers.append(FaasmoeServer(folder, parallel, *layout, dtype, window_s))
        elif name == "llama":
            binary: Path | None = arguments.llama_server
            python = None if binary else _llama_python(arguments)
            servers.append(LlamaServer(folder, parallel, arguments.threads, python, binary))
        elif name == "vllm":
            python = arguments.vllm_python or make_vllm_environment(folder / "venv-vllm")
            dtype, is_compiled = arguments.vllm_dtype, arguments.vllm_compiled
            servers.append(
                VllmServer(folder, parallel, arguments.threads, python, dtype, is_compiled)
            )
        else:
            python = arguments.vllm_python or make_vllm_engine_environment(folder / "venv-vllm")
            dtype, is_compiled = arguments.vllm_dtype, arguments.vllm_compiled
            servers.append(
                FaasmoeServer(folder, parallel, *layout, dtype, window_s, python, is_compiled)
            )
    return servers


def _llama_python(arguments: argparse.Namespace) -> Path:
    if arguments.peers_venv:
        return Path(arguments.peers_venv) / "bin" / "python"
    return make_llama_environment(arguments.cache / "venv-llama")


def prepare(
    arguments: argparse.Namespace, servers: Sequence[PeerServer]
) -> tuple[dict[Cell, PeerServer], list[dict[str, str]]]:
    """Make models and stores.

    Returns:
        The servers by what they can serve, and what they cannot, with the reason.
    """
    cells: dict[Cell, PeerServer] = {}
    not_served: list[dict[str, str]] = []
    for model in arguments.models:
        command = (sys.executable, "-m", "benchmarks.peers.models", str(arguments.cache), model)
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        for precision in arguments.precisions:
            for server in servers:
                cell = Cell(server.name, model, precision)
                try:
                    server.prepare(model, precision)
                    cells[cell] = server
                except NotServedError as error:
                    print(f"{server.name} does not serve {model} in {precision}: {error}")
                    not_served.append(
                        {"server": cell.server, "model": model, "precision": precision}
                        | {"reason": str(error)}
                    )
    return cells, not_served


async def run(
    arguments: argparse.Namespace, cells: dict[Cell, PeerServer], visits: dict[Cell, list[Visit]]
) -> None:
    """Visit every server in every round; results are added to `visits` one by one."""
    plan = VisitPlan(
        arguments.concurrency, arguments.ttft_concurrency, arguments.quick, arguments.rest
    )
    for number in range(arguments.rounds):
        for cell in comparison.visit_order(list(cells), number):
            started_s = time.perf_counter()
            result = await visit(cells[cell], cell.model, cell.precision, plan, number)
            visits.setdefault(cell, []).append(result)
            speeds = ", ".join(f"{b.tokens_per_s:.1f}" for b in result.batches.values())
            print(
                f"  round {number}: {cell.server} {cell.model} {cell.precision}: {speeds} tokens/s,"
                f" {time.perf_counter() - started_s:.0f} s in all",
                flush=True,
            )


def report(
    visits: dict[Cell, list[Visit]], agreed: dict[str, Any], extra: dict[str, Any], folder: Path
) -> None:
    """Print the tables and write peers.json."""
    ratios = comparison.ratio_figures(visits)
    figures = {
        **ratios,
        "best_tokens_ratio": comparison.best_ratios(visits),
        "greedy_agreement": agreed,
        "servers": [
            {"server": c.server, "model": c.model, "precision": c.precision}
            | comparison.cell_figures(runs)
            for c, runs in visits.items()
        ],
        **extra,
    }
    print(f"\n{server_table(visits)}\n\n{ratio_table(ratios)}\n\ngreedy agreement: {agreed}")
    print(f"\n{overview_table(visits, read_day(folder))}")
    print(f"figures: {write_figures('peers', figures, folder=folder)}")


def read_day(folder: Path) -> Mapping[str, Any] | None:
    """Return the figures of `faasmoe bench day`; None if they are not in the folder."""
    file = folder / "day.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def measure(arguments: argparse.Namespace) -> int:
    """Run the benchmark; return 1 if a peer's tokens are nothing like ours.

    What was measured is reported even if a visit fails or the user interrupts.
    """
    machine = describe_machine()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    cells, not_served = prepare(arguments, make_servers(arguments))
    machine["load_1min_at_start"] = os.getloadavg()[0]  # without the preparation
    extra: dict[str, Any] = {
        "not_served": not_served,
        "settings": {n: _plain(value) for n, value in vars(arguments).items() if n != "run"},
        "machine": machine,
    }
    if arguments.llama_server:
        extra["llama_server_version"] = binary_version(arguments.llama_server)
    visits: dict[Cell, list[Visit]] = {}
    agreed: dict[str, Any] = {}
    try:
        asyncio.run(run(arguments, cells, visits))
    finally:
        if visits:
            agreed = comparison.agreements(visits)
            report(visits, agreed, extra, arguments.out.resolve())
    problems = comparison.disagreements(agreed)
    print(*problems, sep="\n", end="")
    return 1 if problems else 0


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
