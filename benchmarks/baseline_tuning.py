"""The in-process side's settings: each is tried, the best is kept, for each batch size its own."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean

from benchmarks.decoding import DecodeRun, equal_token_fraction
from benchmarks.worker import WorkerProcess, running_worker

BATCHED_MM = "batched_mm"
IMPLEMENTATIONS = ("grouped_mm", "eager", BATCHED_MM)
DEFAULT_WAIT_POLICY, PASSIVE_WAIT_POLICY = "default", "PASSIVE"
EQUAL_SPEED_FACTOR = (
    1.02  # within this, the setting that takes less processor time is the better one
)

Prompts = Sequence[Sequence[int]]
StartBaseline = Callable[[str], AbstractAsyncContextManager[WorkerProcess]]


@dataclass(frozen=True, slots=True)
class SettingsTrial:
    """What one setting gave at one batch size.

    Attributes:
        wait: how OpenMP's threads wait for work, fixed when the process starts.
        implementation: transformers' experts implementation.
        run: what it gave.
    """

    wait_policy: str
    implementation: str
    run: DecodeRun

    def format(self) -> str:
        """Return it as a line."""
        return (
            f"batch {self.run.batch}, {self.implementation}, wait {self.wait_policy}: "
            f"{self.run.step_ms:.1f} ms a step, {self.run.cpu_ms_per_token:.1f} CPU ms a token"
        )


@dataclass(frozen=True, slots=True)
class BestSettings:
    """The best settings: one way to wait, and for each batch size an implementation.

    Attributes:
        wait: for the whole process.
        implementations: by batch size.
        trials: everything that was tried.
    """

    wait_policy: str
    implementations: Mapping[int, str]
    trials: tuple[SettingsTrial, ...]

    def self_agreement(self, batch: int) -> float:
        """Return the part of tokens on which the in-process implementations agree themselves."""
        runs = [
            t.run.tokens
            for t in self.trials
            if t.run.batch == batch and t.wait_policy == self.wait_policy
        ]
        return min((equal_token_fraction(runs[0], other) for other in runs[1:]), default=1.0)


@asynccontextmanager
async def running_baseline(
    checkpoint: Path, wait_policy: str, *, max_model_len: int
) -> AsyncIterator[WorkerProcess]:
    """Run the in-process side as long as the context lasts."""
    environment = dict(os.environ)
    if wait_policy != DEFAULT_WAIT_POLICY:
        environment["OMP_WAIT_POLICY"] = wait_policy
    arguments = (str(checkpoint), "--max-model-len", str(max_model_len))
    async with running_worker(
        "benchmarks.transformers_worker", *arguments, environment=environment
    ) as side:
        yield side


@asynccontextmanager
async def running_best_baseline(
    start: StartBaseline,
    wait_policies: Sequence[str],
    prompts: Mapping[int, Prompts],
    *,
    max_tokens: int,
    fits: Callable[[str, int], bool],
) -> AsyncIterator[tuple[WorkerProcess, BestSettings]]:
    """Try every setting; run the in-process side with the best as long as the context lasts.

    Args:
        start: starts the in-process side with a way to wait.
        waits: the ways to try.
        prompts: what each batch size is tried with.
        max_tokens: tokens that each request generates in a trial.
        fits: whether an implementation has the memory for a batch of so many prompts.
    """
    trials: list[SettingsTrial] = []
    async with AsyncExitStack() as stack:
        for wait in wait_policies:
            await stack.aclose()  # the weights of one process at a time
            side = await stack.enter_async_context(start(wait))
            for batch, texts in prompts.items():
                for implementation in IMPLEMENTATIONS:
                    if fits(implementation, batch):
                        await side.run_batch(texts, max_tokens=4, implementation=implementation)
                        run = await side.run_batch(
                            texts, max_tokens=max_tokens, implementation=implementation
                        )
                        trials.append(SettingsTrial(wait, implementation, run))
                        print(f"  {trials[-1].format()}")
        settings = choose_settings(trials)
        if settings.wait_policy != wait_policies[-1]:
            await stack.aclose()
            side = await stack.enter_async_context(start(settings.wait_policy))
        yield side, settings


def choose_settings(trials: Sequence[SettingsTrial]) -> BestSettings:
    """Return the settings with the least time; of almost equal ones, that with less CPU time."""
    by_wait: dict[str, dict[int, SettingsTrial]] = {}
    for wait, batch in dict.fromkeys((t.wait_policy, t.run.batch) for t in trials):
        tried = [[t] for t in trials if (t.wait_policy, t.run.batch) == (wait, batch)]
        (by_wait.setdefault(wait, {})[batch],) = _fastest(tried)
    chosen = _fastest([list(found.values()) for found in by_wait.values()])
    implementations = {trial.run.batch: trial.implementation for trial in chosen}
    return BestSettings(chosen[0].wait_policy, implementations, tuple(trials))


def _fastest(candidates: Sequence[Sequence[SettingsTrial]]) -> Sequence[SettingsTrial]:
    """Return the best candidate; one with several trials counts by their geometric mean."""

    def step_ms(trials: Sequence[SettingsTrial]) -> float:
        return geometric_mean(trial.run.step_ms for trial in trials)

    def cpu_ms(trials: Sequence[SettingsTrial]) -> float:
        return geometric_mean(trial.run.cpu_ms_per_token for trial in trials)

    bound_ms = min(map(step_ms, candidates)) * EQUAL_SPEED_FACTOR
    return min((trials for trials in candidates if step_ms(trials) <= bound_ms), key=cpu_ms)
