"""One run of the GPU's benchmark: each side alone, in turn, as far as the time goes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.comparison import draw_prompts
from benchmarks.cuda import tables
from benchmarks.cuda.asking import NoAnswer, ask
from benchmarks.cuda.attach import AttachTimes, measure_attach, text_of
from benchmarks.cuda.plan import Amount, Clock, Plan, Variant
from benchmarks.decoding import Run
from benchmarks.fleet import serving, write_moemodel
from benchmarks.geometry import ITEM_BYTES
from benchmarks.sides import Side, running

from faasmoe_expert.store import Store
from faasmoe_operator.errors import FaasmoeError

MAX_MODEL_LEN = 256
BATCHED_MOST = 8  # batched_mm copies every pair's weights: beyond, it is slower and may not fit
IN_PROCESS, IN_PROCESS_GRAPHS = "in_process", "in_process_graphs"
TRIAL_TOKENS = 10


@dataclass(slots=True)
class Findings:
    """What was measured so far.

    Attributes:
        runs: by side, then by batch size.
        implementations: transformers' experts implementation, by batch size.
        profiles: where a step's time goes, by side, then by batch size.
        attach: by device.
        ways: microseconds of a round trip between two processes, by way, then by size in bytes.
        left_out: what there was no time for.
        failures: sides that failed, and why.
    """

    runs: dict[str, dict[int, list[Run]]] = field(default_factory=dict)
    implementations: dict[int, str] = field(default_factory=dict)
    profiles: dict[str, dict[int, dict[str, float]]] = field(default_factory=dict)
    attach: dict[str, AttachTimes] = field(default_factory=dict)
    ways: dict[str, Any] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)


class Benchmark:
    """One run of the benchmark."""

    def __init__(self, plan: Plan, store: Path, folder: Path, clock: Clock) -> None:
        self._plan = plan
        self._store = store
        self._folder = folder
        self._clock = clock
        self._longest_s: dict[str, float] = {}
        self.found = Findings()

    async def measure(self) -> None:
        """Measure everything, the most important first."""
        plan = self._plan
        await self._measure_attach(plan.device)
        await self._measure_ways()
        await self._measure_side(IN_PROCESS, self._in_process(graphs=False), plan.amount)
        for variant in plan.variants:
            await self._measure_side(variant.name, self._serving(variant), variant.amount)
        if plan.device != "cpu":
            await self._measure_attach("cpu")
            graphs = self._in_process(graphs=True)
            await self._measure_side(IN_PROCESS_GRAPHS, graphs, plan.amount)

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
            self._fail(what, error)
            return
        self.found.attach[device] = times
        print(f"  {text_of(times)}", flush=True)

    async def _measure_ways(self) -> None:
        """Measure what a frame's way costs; a way that is not there is named in the figures."""
        if not self._has_time("ways"):
            return
        row_bytes = self._plan.geometry.hidden * ITEM_BYTES
        try:
            self.found.ways = await ask(
                "benchmarks.cuda.round_trips", self._plan.device, str(row_bytes)
            )
        except NoAnswer as error:
            self._fail("ways", error)

    async def _measure_side(
        self, name: str, side: AbstractAsyncContextManager[Side], amount: Amount
    ) -> None:
        if not self._has_time(name):
            return
        print(f"{name}, {self._clock.left_s:.0f} s left", flush=True)
        try:
            async with asyncio.timeout(max(1.0, self._clock.left_s)), side as entered:
                for batch in amount.batches:
                    await self._measure_batch(name, entered, batch, amount)
        except TimeoutError:
            self._leave_out(f"the rest of {name}")
        except (RuntimeError, OSError, FaasmoeError) as error:
            self._fail(name, error)

    async def _measure_batch(self, name: str, side: Side, batch: int, amount: Amount) -> None:
        if not self._has_time(f"{name} at batch {batch}", self._longest_s.get(name, 0.0)):
            return
        begun_s, tokens = time.monotonic(), amount.tokens
        is_ours = name not in (IN_PROCESS, IN_PROCESS_GRAPHS)
        named = {} if is_ours else {"implementation": await self._implementation(side, batch)}
        await self._run(side, batch, tokens, seed=-1, **named)
        rounds = range(amount.rounds)
        runs = [await self._run(side, batch, tokens, seed=seed, **named) for seed in rounds]
        self.found.runs.setdefault(name, {})[batch] = runs
        if is_ours:
            parts = await self._profile(side, batch, tokens)
            self.found.profiles.setdefault(name, {})[batch] = parts
        took_s = time.monotonic() - begun_s
        self._longest_s[name] = max(took_s, self._longest_s.get(name, 0.0))
        print(f"  batch {batch}: {tables.line_of(runs)}, took {took_s:.0f} s", flush=True)

    async def _implementation(self, side: Side, batch: int) -> str:
        """Return the in-process side's best experts implementation at this batch size."""
        if batch in self.found.implementations:
            return self.found.implementations[batch]
        names = ["grouped_mm", *(["batched_mm"] if batch <= BATCHED_MOST else [])]
        times_ms = {}
        for name in names:
            for _ in range(2):  # the first warms up
                run = await self._run(side, batch, TRIAL_TOKENS, seed=-1, implementation=name)
            times_ms[name] = run.step_ms
        best = min(names, key=lambda name: times_ms[name])
        self.found.implementations[batch] = best
        return best

    async def _run(self, side: Side, batch: int, tokens: int, *, seed: int, **more: Any) -> Run:
        prompts = draw_prompts(batch, vocabulary=self._plan.geometry.vocabulary, seed=seed)
        return await side.run(prompts, max_tokens=tokens, **more)

    async def _profile(self, side: Side, batch: int, tokens: int) -> dict[str, float]:
        """Return the parts of a step; the experts' of the steps by which one run is longer."""
        fewer = max(4, tokens // 4)
        short = await self._run(side, batch, fewer, seed=0, profile=True)
        long = await self._run(side, batch, tokens, seed=0, profile=True)
        return tables.parts_of(long, short, more_steps=tokens - fewer)

    def _has_time(self, what: str, needed_s: float = 0.0) -> bool:
        has_time = self._clock.left_s > needed_s
        if not has_time:
            self._leave_out(what)
        return has_time

    def _leave_out(self, what: str) -> None:
        self.found.left_out.append(what)
        print(f"  {what}: left out, {self._clock.left_s:.0f} s are left", flush=True)

    def _fail(self, what: str, error: BaseException) -> None:
        reason = str(error) or type(error).__name__
        self.found.failures[what] = reason
        print(f"  {what} failed: {reason}", flush=True)

    def _in_process(self, *, graphs: bool) -> AbstractAsyncContextManager[Side]:
        plan = self._plan
        arguments = [
            *(str(self._store), "--device", plan.device),
            *("--max-model-len", str(MAX_MODEL_LEN)),
            *("--max-num-seqs", str(plan.most_seqs)),
            *("--kv-cache-bytes", str(plan.kv_cache_bytes)),
            *(["--graphs"] if graphs else []),
        ]
        return running("benchmarks.in_process", *arguments)

    @asynccontextmanager
    async def _serving(self, variant: Variant) -> AsyncIterator[Side]:
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
                "maxNumSeqs": plan.most_seqs,
                "kvCacheMemory": str(plan.kv_cache_bytes),
            },
        )
        async with serving(moemodel) as fleet:
            yield fleet.side
