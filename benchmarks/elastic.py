"""Elasticity of functions: activation latency, time to first token after idle, and memory.

`python -m benchmarks.elastic [--quick] [--memory] [--layers N] [--engine vllm]`. Everything runs
under `faasmoe up`. docs/performance.md has the method and the results.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import string
import sys
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.activation import measure_activations_s
from benchmarks.geometry import CheckpointGeometry, qwen_geometry, small_geometry
from benchmarks.peers.environments import make_vllm_engine_environment
from benchmarks.report import OUT, Spread, describe_machine, percentile, write_figures
from benchmarks.static_deployment import make_model_in_subprocess, write_moemodel
from benchmarks.ttft import TTFTMeasurements, generate, measure_ttft
from benchmarks.up_process import UpProcess, running_up
from benchmarks.worker import ROOT

from faasmoe_contracts.store import Store, StoreError
from faasmoe_operator.cli.formatting import format_table
from faasmoe_operator.cli.router import VLLM_PYTHON_VARIABLE

CACHE = Path.home() / ".cache" / "faasmoe-bench"
DEMO = ROOT / ".faasmoe"
DEMO_EXPERTS_PER_FUNCTION = 3  # as in examples/demo.yaml
DEMO_FUNCTIONS_PER_SANDBOX = 30
WINDOW_S = 6  # Knative's minimum, so that functions scale to zero quickly between rounds
LONG_WINDOW_S = 600
WARM_POOL = 2
N_PROMPTS = 32
PROMPT_CHARACTERS = 64
MAX_MODEL_LEN = 256
MEMORY_SETTLE_S = 2.0  # sandboxes release request memory one second after a request

Figures = dict[str, Any]


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """The router's engine in all measurements.

    Attributes:
        name: value of `spec.router.engine`; the figures of engines other than transformers are in
            files of their own.
        variables: environment variables of `faasmoe up`.
    """

    name: str = "transformers"
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def suffix(self) -> str:
        """What the names of its files end in."""
        return "" if self.name == "transformers" else f"_{self.name}"


@dataclass(frozen=True, slots=True)
class ElasticPlan:
    """The extent of the benchmark.

    Attributes:
        geometry: sizes of the model whose functions are activated.
        experts_per_function: experts of one layer per function.
        private_experts_per_function: the same for the measurement of private memory, which needs
            many functions.
        rounds: activations of each function, with and without a warm pool.
        first_token_rounds: rounds of idle and warm requests for each pool size.
        pools: warm pool sizes for the demo model; the first one gives the headline figure. If
            empty, the time to first token is measured on the model of `geometry`, which is faster.
    """

    geometry: CheckpointGeometry
    experts_per_function: int
    private_experts_per_function: int
    rounds: int
    first_token_rounds: int
    pools: tuple[int, ...]


def full_plan(layers: int, rounds: int) -> ElasticPlan:
    """Return the plan whose figures are published: 3 functions per layer, 6 for private memory."""
    return ElasticPlan(qwen_geometry(layers), 20, 10, rounds, rounds, (1, 3, 0))


def quick_plan() -> ElasticPlan:
    """Return a smoke test that takes seconds; its figures are meaningless.

    Its heads are of the least size that vLLM's attention on a CPU has.
    """
    return ElasticPlan(replace(small_geometry(), heads=2), 4, 4, 1, 1, ())


class ElasticBenchmark:
    """The measurements, each with its own `faasmoe up`.

    Args:
        plan: the extent of the benchmark.
        checkpoint: checkpoint of the model of `plan.geometry`.
        store: its store.
        engine: the router's engine.

    Attributes:
        ttft_by_pool: times to first token by warm pool size.
    """

    def __init__(
        self, plan: ElasticPlan, *, checkpoint: Path, store: Path, engine: EngineChoice
    ) -> None:
        self.ttft_by_pool: dict[int, TTFTMeasurements] = {}
        self._plan = plan
        self._checkpoint = checkpoint
        self._store = store
        self._engine = engine

    async def measure_activation(self, *, pool: int) -> Figures:
        """Measure activation latency and the number of sandboxes that remain when idle."""
        print(f"activation, warm pool of {pool}")
        file = self._moemodel(f"activation-{pool}", pool=pool, window_s=WINDOW_S)
        async with self._running_up(file) as model:
            times_s, n_idle = await measure_activations_s(model, rounds=self._plan.rounds)
            if pool == WARM_POOL and not self._plan.pools:
                self.ttft_by_pool[pool] = await measure_ttft(
                    model, rounds=self._plan.first_token_rounds
                )
        print(f"  {Spread.from_values(times_s).format(3)} s, {n_idle} sandboxes when idle")
        return {"times_s": times_s, "idle_sandboxes": n_idle}

    async def measure_memory(self, *, experts_per_function: int) -> Figures:
        """Measure memory with every function active and used, one function per sandbox."""
        print(f"memory, {experts_per_function} experts per function")
        file = self._moemodel(
            f"memory-{experts_per_function}",
            experts_per_function=experts_per_function,
            pool=0,
            window_s=LONG_WINDOW_S,
        )
        async with self._running_up(file) as model:
            for seed in range(2):
                await generate(model, _prompts(seed), max_tokens=8)
            await asyncio.sleep(MEMORY_SETTLE_S)
            n_functions = sum(f["ready"] for f in (await model.status())["functions"])
            sandboxes, pages = model.sandbox_memory()
            total = model.memory()
            overhead = model.overhead_bytes()
            return {
                "functions": n_functions,
                "sandboxes": len(model.sandboxes()),
                "all": asdict(total),
                "all_sandboxes": asdict(sandboxes),
                "store_pages_bytes": pages,
                "floor_bytes": model.floor_bytes,
                "over_floor": total.total / model.floor_bytes,
                "beyond_weights_mb": {name: size / 1e6 for name, size in overhead.items()},
                "private_mb_per_function": (sandboxes.total - pages) / n_functions / 1e6,
            }

    async def measure_ttft(self, *, pool: int) -> None:
        """Measure the demo model's time to first token, after idle and warm."""
        print(f"time to first token, warm pool of {pool}")
        await _make_demo_model()
        async with self._running_up(self._demo_moemodel(pool)) as model:
            self.ttft_by_pool[pool] = await measure_ttft(
                model, rounds=self._plan.first_token_rounds
            )

    def _running_up(self, file: Path) -> AbstractAsyncContextManager[UpProcess]:
        return running_up(file, variables=self._engine.variables)

    def _moemodel(
        self, name: str, *, pool: int, window_s: float, experts_per_function: int | None = None
    ) -> Path:
        file = self._store.with_name(f"{self._store.name}-{name}{self._engine.suffix}.yaml")
        write_moemodel(
            file,
            checkpoint=self._checkpoint,
            store=self._store,
            experts_per_function=experts_per_function or self._plan.experts_per_function,
            max_model_len=MAX_MODEL_LEN,
            experts={"warmPool": pool, "scaling": _scaling(window_s)},
            router={"engine": self._engine.name},
        )
        return file

    def _demo_moemodel(self, pool: int) -> Path:
        file = DEMO / f"bench-first-token-{pool}{self._engine.suffix}.yaml"
        write_moemodel(
            file,
            checkpoint=DEMO / "demo-model",
            store=DEMO / "demo-store",
            experts_per_function=DEMO_EXPERTS_PER_FUNCTION,
            max_model_len=2048,
            experts={
                "functionsPerSandbox": DEMO_FUNCTIONS_PER_SANDBOX,
                "warmPool": pool,
                "scaling": _scaling(WINDOW_S),
            },
            router={"engine": self._engine.name},
        )
        return file


def _scaling(window_s: float) -> Mapping[str, float]:
    return {
        "windowSeconds": window_s,
        "panicWindowPercentage": 20,
        "scaleToZeroGracePeriodSeconds": 0,
    }


def _prompts(seed: int) -> list[str]:
    draw = random.Random(seed)
    characters = string.ascii_letters + string.digits + string.punctuation
    return ["".join(draw.choices(characters, k=PROMPT_CHARACTERS)) for _ in range(N_PROMPTS)]


async def _make_demo_model() -> None:
    """Build the demo model and its store in the folder of `make demo`, unless they exist."""
    checkpoint, store = DEMO / "demo-model", DEMO / "demo-store"
    await _faasmoe("demo-model", str(checkpoint))
    try:
        Store.open(store)
    except StoreError:
        force = ("--force",) if store.exists() else ()
        await _faasmoe("prepare", checkpoint.as_uri(), str(store), *force)


async def _faasmoe(*arguments: str) -> None:
    command = (sys.executable, "-m", "faasmoe_operator.cli", *arguments)
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT)
    if await process.wait():
        raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}")


async def measure(plan: ElasticPlan, folder: Path, engine: EngineChoice) -> Figures:
    """Run all measurements; return the content of elastic.json."""
    machine = describe_machine()
    checkpoint, store = await make_model_in_subprocess(plan.geometry, folder)
    benchmark = ElasticBenchmark(plan, checkpoint=checkpoint, store=store, engine=engine)
    warm = await benchmark.measure_activation(pool=WARM_POOL)
    empty = await benchmark.measure_activation(pool=0)
    memory = await _measure_memory(benchmark, plan)
    for pool in plan.pools:
        await benchmark.measure_ttft(pool=pool)
    ttft_by_pool = benchmark.ttft_by_pool
    return {
        "machine": machine,
        "engine": engine.name,
        "geometry": asdict(plan.geometry),
        "experts_per_function": plan.experts_per_function,
        "attach_p50_s": percentile(warm["times_s"], 50),
        "attach_p99_s": percentile(warm["times_s"], 99),
        "cold_start_p50_s": percentile(empty["times_s"], 50),
        "cold_start_p99_s": percentile(empty["times_s"], 99),
        "samples": len(warm["times_s"]),
        "ttft_after_idle_ratio": next(iter(ttft_by_pool.values())).ratio.median,
        "ttft_by_pool": {str(pool): ttft.to_json() for pool, ttft in ttft_by_pool.items()},
        "idle_sandboxes": {
            "0": empty["idle_sandboxes"],
            str(WARM_POOL): warm["idle_sandboxes"],
        },
        **memory,
    }


async def measure_memory(plan: ElasticPlan, folder: Path, engine: EngineChoice) -> Figures:
    """Measure memory only; return the content of elastic_memory.json."""
    machine = describe_machine()
    checkpoint, store = await make_model_in_subprocess(plan.geometry, folder)
    benchmark = ElasticBenchmark(plan, checkpoint=checkpoint, store=store, engine=engine)
    memory = await _measure_memory(benchmark, plan)
    return {"machine": machine, "engine": engine.name, **memory}


async def _measure_memory(benchmark: ElasticBenchmark, plan: ElasticPlan) -> Figures:
    sizes = (plan.experts_per_function, plan.private_experts_per_function)
    by_size = {
        n: await benchmark.measure_memory(experts_per_function=n) for n in dict.fromkeys(sizes)
    }
    all_warm, private = (by_size[n] for n in sizes)
    return {
        "private_mb_per_function": private["private_mb_per_function"],
        "memory_over_floor": all_warm["over_floor"],
        "memory": {"all_warm": all_warm, "private": private},
    }


def format_results(figures: Figures) -> str:
    """Return the table of all measurements."""
    rows = [
        (f"{name}_{part}_s", f"{figures[f'{name}_{part}_s']:.3f}")
        for name in ("attach", "cold_start")
        for part in ("p50", "p99")
    ]
    for pool, ttft in figures["ttft_by_pool"].items():
        for name in ("ratio", "idle_s", "warm_s", "cold_start_s"):
            rows.append((f"time to first token, pool {pool}: {name}", ttft[name].format(3)))
    for pool, n_idle in figures["idle_sandboxes"].items():
        rows.append((f"sandboxes when idle, pool {pool}", str(n_idle)))
    return format_table(("", "MEASURED"), [*rows, *_memory_rows(figures)])


def format_memory(figures: Figures) -> str:
    """Return the table of memory measurements."""
    return format_table(("", "MEASURED"), _memory_rows(figures))


def _memory_rows(figures: Figures) -> list[tuple[str, str]]:
    """Return the two headline figures and the overhead beyond the weights by kind of process."""
    n_functions = figures["memory"]["private"]["functions"]
    overhead_mb = figures["memory"]["all_warm"]["beyond_weights_mb"].items()
    return [
        (
            f"private_mb_per_function ({n_functions} functions)",
            f"{figures['private_mb_per_function']:.1f}",
        ),
        ("memory_over_floor", f"{figures['memory_over_floor']:.3f}"),
        *((f"MB beyond the weights, {name}", f"{size:.1f}") for name, size in overhead_mb),
    ]


def _choose_engine(arguments: argparse.Namespace) -> EngineChoice:
    """Return the engine; makes the environment of vLLM's if none is given."""
    if arguments.engine == "transformers":
        return EngineChoice()
    python = arguments.vllm_python or make_vllm_engine_environment(
        arguments.cache.resolve() / "peers" / "venv-vllm"
    )
    return EngineChoice(arguments.engine, {VLLM_PYTHON_VARIABLE: str(python)})


def main() -> int:
    """Parse the command line and run the benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.elastic",
        description="Measure activation latency, time to first token after idle, and memory.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="smoke test with a tiny model")
    parser.add_argument("--memory", action="store_true", help="measure memory only")
    parser.add_argument("--layers", type=int, default=4, help="MoE layers of the model")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each measurement")
    parser.add_argument(
        "--engine",
        choices=("transformers", "vllm"),
        default="transformers",
        help="the router's; vllm writes elastic_vllm.json or elastic_memory_vllm.json",
    )
    parser.add_argument(
        "--vllm-python",
        type=Path,
        default=os.environ.get(VLLM_PYTHON_VARIABLE),
        help=f"Python with vLLM and our router (${VLLM_PYTHON_VARIABLE}); made below --cache if "
        "omitted",
    )
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of generated models")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the figures")
    arguments = parser.parse_args()
    plan = quick_plan() if arguments.quick else full_plan(arguments.layers, arguments.rounds)
    folder, out = arguments.cache.resolve(), arguments.out.resolve()
    engine = _choose_engine(arguments)
    if arguments.memory:
        figures = asyncio.run(measure_memory(plan, folder, engine))
        print(f"\n{format_memory(figures)}")
        path = write_figures(f"elastic_memory{engine.suffix}", figures, folder=out)
    else:
        figures = asyncio.run(measure(plan, folder, engine))
        print(f"\n{format_results(figures)}")
        path = write_figures(f"elastic{engine.suffix}", figures, folder=out)
    print(f"\nfigures: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
