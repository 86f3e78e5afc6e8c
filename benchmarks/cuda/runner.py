"""The measurements of the GPU benchmark, one system at a time until the deadline.

This process does not import torch; everything that needs it runs in a child process.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.alternating_runs import draw_prompts
from benchmarks.cuda import tables
from benchmarks.cuda.attach import AttachTimes, format_attach_times, measure_attach
from benchmarks.cuda.plan import CudaPlan, Deadline, FunctionsVariant, RunAmount
from benchmarks.decoding import DecodeRun
from benchmarks.geometry import ITEM_BYTES
from benchmarks.static_deployment import running_static_deployment, write_moemodel
from benchmarks.worker import ROOT, WorkerProcess, running_worker

from faasmoe_contracts.store import Store
from faasmoe_operator.errors import FaasmoeError


class ModuleFailed(RuntimeError):
    """A child process failed and has printed the reason.

    Attributes:
        status: its exit status.
    """

    def __init__(self, module: str, status: int) -> None:
        super().__init__(f"{module} ended with status {status}")
        self.status = status


async def run_module_json(module: str, *arguments: str) -> dict[str, Any]:
    """Run a module and return the JSON object in its last output line.

    Raises:
        ModuleFailed: it exited with a status other than 0.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, *arguments), stdout=asyncio.subprocess.PIPE, cwd=ROOT
    )
    output, _ = await process.communicate()
    if process.returncode:
        raise ModuleFailed(module, process.returncode)
    return dict(json.loads(output.splitlines()[-1]))


MAX_MODEL_LEN = 256
BATCHED_MM_MAX_BATCH = 8  # batched_mm copies the weights of every pair; slow and large beyond
IN_PROCESS, IN_PROCESS_GRAPHS = "in_process", "in_process_graphs"
TRIAL_TOKENS = 10


@dataclass(slots=True)
class CudaResults:
    """Results so far.

    Attributes:
        runs: runs by system and batch size.
        implementations: experts implementation of the baseline by batch size.
        profiles: milliseconds per part of a step, by system and batch size.
        attach: attach times by device.
        transports: round-trip times between two processes in µs, by transport and size in bytes.
        skipped: measurements for which there was no time.
        failures: reason for each failed measurement.
    """

    runs: dict[str, dict[int, list[DecodeRun]]] = field(default_factory=dict)
    implementations: dict[int, str] = field(default_factory=dict)
    profiles: dict[str, dict[int, dict[str, float]]] = field(default_factory=dict)
    attach: dict[str, AttachTimes] = field(default_factory=dict)
    transports: dict[str, Any] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)


class CudaBenchmark:
    """One run of the benchmark.

    Args:
        plan: the extent of the benchmark.
        store: store of the model.
        folder: folder for MoEModel files.
        deadline: remaining time.

    Attributes:
        results: results so far.
    """

    def __init__(self, plan: CudaPlan, store: Path, folder: Path, deadline: Deadline) -> None:
        self._plan = plan
        self._store = store
        self._folder = folder
        self._deadline = deadline
        self._longest_batch_s: dict[str, float] = {}
        self.results = CudaResults()

    async def measure(self) -> None:
        """Run all measurements in order of importance."""
        plan = self._plan
        await self._measure_attach(plan.device)
        await self._measure_transports()
        await self._measure_worker(IN_PROCESS, self._baseline(graphs=False), plan.amount)
        for variant in plan.variants:
            await self._measure_worker(variant.name, self._running_variant(variant), variant.amount)
        if plan.device != "cpu":
            await self._measure_attach("cpu")
            graphs = self._baseline(graphs=True)
            await self._measure_worker(IN_PROCESS_GRAPHS, graphs, plan.amount)

    async def _measure_attach(self, device: str) -> None:
        what, plan = f"attach on {device}", self._plan
        if not self._has_time(what):
            return
        store = Store.open(self._store)
        try:
            times = await measure_attach(
                store, device=device, experts=plan.attached_experts, rounds=plan.attaches
            )
        except (RuntimeError, OSError, FaasmoeError) as error:
            self._record_failure(what, error)
            return
        self.results.attach[device] = times
        print(f"  {format_attach_times(times)}", flush=True)

    async def _measure_transports(self) -> None:
        """Measure the transports between router and sandbox."""
        if not self._has_time("transports"):
            return
        row_bytes = self._plan.geometry.hidden * ITEM_BYTES
        try:
            self.results.transports = await run_module_json(
                "benchmarks.cuda.round_trips", self._plan.device, str(row_bytes)
            )
        except ModuleFailed as error:
            self._record_failure("transports", error)

    async def _measure_worker(
        self, name: str, worker: AbstractAsyncContextManager[WorkerProcess], amount: RunAmount
    ) -> None:
        if not self._has_time(name):
            return
        print(f"{name}, {self._deadline.remaining_s:.0f} s left", flush=True)
        try:
            async with asyncio.timeout(max(1.0, self._deadline.remaining_s)), worker as running:
                for batch in amount.batches:
                    await self._measure_batch(name, running, batch, amount)
        except TimeoutError:
            self._skip(f"the rest of {name}")
        except (RuntimeError, OSError, FaasmoeError) as error:
            self._record_failure(name, error)

    async def _measure_batch(
        self, name: str, worker: WorkerProcess, batch: int, amount: RunAmount
    ) -> None:
        if not self._has_time(f"{name} at batch {batch}", self._longest_batch_s.get(name, 0.0)):
            return
        started_s, tokens = time.monotonic(), amount.tokens
        is_ours = name not in (IN_PROCESS, IN_PROCESS_GRAPHS)
        options = (
            {}
            if is_ours
            else {"implementation": await self._best_experts_implementation(worker, batch)}
        )
        await self._run(worker, batch, tokens, seed=-1, **options)
        rounds = range(amount.rounds)
        runs = [await self._run(worker, batch, tokens, seed=seed, **options) for seed in rounds]
        self.results.runs.setdefault(name, {})[batch] = runs
        if is_ours:
            parts = await self._profile(worker, batch, tokens)
            self.results.profiles.setdefault(name, {})[batch] = parts
        took_s = time.monotonic() - started_s
        self._longest_batch_s[name] = max(took_s, self._longest_batch_s.get(name, 0.0))
        print(f"  batch {batch}: {tables.format_runs(runs)}, took {took_s:.0f} s", flush=True)

    async def _best_experts_implementation(self, worker: WorkerProcess, batch: int) -> str:
        """Return the baseline's fastest experts implementation at a batch size."""
        if batch in self.results.implementations:
            return self.results.implementations[batch]
        names = ["grouped_mm", *(["batched_mm"] if batch <= BATCHED_MM_MAX_BATCH else [])]
        times_ms = {}
        for name in names:
            for _ in range(2):  # the first run is a warm-up
                run = await self._run(worker, batch, TRIAL_TOKENS, seed=-1, implementation=name)
            times_ms[name] = run.step_ms
        best = min(names, key=lambda name: times_ms[name])
        self.results.implementations[batch] = best
        return best

    async def _run(
        self, worker: WorkerProcess, batch: int, tokens: int, *, seed: int, **options: Any
    ) -> DecodeRun:
        prompts = draw_prompts(batch, vocabulary=self._plan.geometry.vocabulary, seed=seed)
        return await worker.run_batch(prompts, max_tokens=tokens, **options)

    async def _profile(self, worker: WorkerProcess, batch: int, tokens: int) -> dict[str, float]:
        """Return the parts of a step in ms, from a short and a long profiled run."""
        n_short = max(4, tokens // 4)
        short = await self._run(worker, batch, n_short, seed=0, profile=True)
        long = await self._run(worker, batch, tokens, seed=0, profile=True)
        return tables.step_parts_ms(long, short, extra_steps=tokens - n_short)

    def _has_time(self, what: str, needed_s: float = 0.0) -> bool:
        has_time = self._deadline.remaining_s > needed_s
        if not has_time:
            self._skip(what)
        return has_time

    def _skip(self, what: str) -> None:
        self.results.skipped.append(what)
        print(f"  {what}: skipped, {self._deadline.remaining_s:.0f} s left", flush=True)

    def _record_failure(self, what: str, error: BaseException) -> None:
        reason = str(error) or type(error).__name__
        self.results.failures[what] = reason
        print(f"  {what} failed: {reason}", flush=True)

    def _baseline(self, *, graphs: bool) -> AbstractAsyncContextManager[WorkerProcess]:
        plan = self._plan
        arguments = [
            *(str(self._store), "--device", plan.device),
            *("--max-model-len", str(MAX_MODEL_LEN)),
            *("--max-num-seqs", str(plan.max_num_seqs)),
            *("--kv-cache-bytes", str(plan.kv_cache_bytes)),
            *(["--graphs"] if graphs else []),
        ]
        return running_worker("benchmarks.transformers_worker", *arguments)

    @asynccontextmanager
    async def _running_variant(self, variant: FunctionsVariant) -> AsyncIterator[WorkerProcess]:
        plan, moemodel = self._plan, self._folder / f"{variant.name}.yaml"
        write_moemodel(
            moemodel,
            checkpoint=Path(Store.open(self._store).manifest.model.source),
            store=self._store,
            experts_per_function=variant.experts_per_function,
            max_model_len=MAX_MODEL_LEN,
            experts=variant.settings(plan.geometry),
            router={
                "device": plan.device,
                "maxNumSeqs": plan.max_num_seqs,
                "kvCacheMemory": str(plan.kv_cache_bytes),
            },
        )
        async with running_static_deployment(moemodel) as deployment:
            yield deployment.router
