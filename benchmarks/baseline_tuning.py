"""Tuning of the in-process baseline, so that FaaSMoE is compared with its fastest settings."""

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
EQUAL_SPEED_FACTOR = 1.02  # among settings within 2 % of the fastest, the least CPU time wins

Prompts = Sequence[Sequence[int]]
StartBaseline = Callable[[str], AbstractAsyncContextManager[WorkerProcess]]


@dataclass(frozen=True, slots=True)
class SettingsTrial:
    """The run of one combination of settings at one batch size.

    Attributes:
        wait_policy: OMP_WAIT_POLICY of the process.
        implementation: experts implementation of transformers.
        run: the measured run.
    """

    wait_policy: str
    implementation: str
    run: DecodeRun

    def format(self) -> str:
        """Return a one-line description."""
        return (
            f"batch {self.run.batch}, {self.implementation}, wait {self.wait_policy}: "
            f"{self.run.step_ms:.1f} ms per step, {self.run.cpu_ms_per_token:.1f} CPU ms per token"
        )


@dataclass(frozen=True, slots=True)
class BestSettings:
    """The best settings: one wait policy per process, one implementation per batch size.

    Attributes:
        wait_policy: OMP_WAIT_POLICY of the process.
        implementations: experts implementation by batch size.
        trials: all trials.
    """

    wait_policy: str
    implementations: Mapping[int, str]
    trials: tuple[SettingsTrial, ...]

    def self_agreement(self, batch: int) -> float:
        """Return the fraction of tokens on which the baseline's own implementations agree."""
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
    """Run the baseline worker for the lifetime of the context.

    Args:
        checkpoint: the model.
        wait_policy: OMP_WAIT_POLICY, or DEFAULT_WAIT_POLICY to leave it unset.
        max_model_len: maximum tokens of a request.
    """
    environment = dict(os.environ)
    if wait_policy != DEFAULT_WAIT_POLICY:
        environment["OMP_WAIT_POLICY"] = wait_policy
    arguments = (str(checkpoint), "--max-model-len", str(max_model_len))
    async with running_worker(
        "benchmarks.transformers_worker", *arguments, environment=environment
    ) as worker:
        yield worker


@asynccontextmanager
async def running_best_baseline(
    start: StartBaseline,
    wait_policies: Sequence[str],
    prompts: Mapping[int, Prompts],
    *,
    max_tokens: int,
    fits: Callable[[str, int], bool],
) -> AsyncIterator[tuple[WorkerProcess, BestSettings]]:
    """Try all settings, then run the baseline with the best for the lifetime of the context.

    Args:
        start: starts the baseline with a wait policy.
        wait_policies: the wait policies to try.
        prompts: prompts of the trials by batch size.
        max_tokens: tokens to generate per request in a trial.
        fits: whether an implementation fits into memory at a batch size.

    Yields:
        The worker and its settings.
    """
    trials: list[SettingsTrial] = []
    async with AsyncExitStack() as stack:
        for wait_policy in wait_policies:
            await stack.aclose()  # memory holds one copy of the weights
            worker = await stack.enter_async_context(start(wait_policy))
            for batch, batch_prompts in prompts.items():
                for implementation in IMPLEMENTATIONS:
                    if fits(implementation, batch):
                        await worker.run_batch(
                            batch_prompts, max_tokens=4, implementation=implementation
                        )
                        run = await worker.run_batch(
                            batch_prompts, max_tokens=max_tokens, implementation=implementation
                        )
                        trials.append(SettingsTrial(wait_policy, implementation, run))
                        print(f"  {trials[-1].format()}")
        settings = choose_settings(trials)
        if settings.wait_policy != wait_policies[-1]:
            await stack.aclose()
            worker = await stack.enter_async_context(start(settings.wait_policy))
        yield worker, settings


def choose_settings(trials: Sequence[SettingsTrial]) -> BestSettings:
    """Return the fastest settings; among almost equal ones, those with the least CPU time."""
    by_policy: dict[str, dict[int, SettingsTrial]] = {}
    for policy, batch in dict.fromkeys((t.wait_policy, t.run.batch) for t in trials):
        candidates = [[t] for t in trials if (t.wait_policy, t.run.batch) == (policy, batch)]
        (by_policy.setdefault(policy, {})[batch],) = _fastest(candidates)
    chosen = _fastest([list(by_batch.values()) for by_batch in by_policy.values()])
    implementations = {trial.run.batch: trial.implementation for trial in chosen}
    return BestSettings(chosen[0].wait_policy, implementations, tuple(trials))


def _fastest(candidates: Sequence[Sequence[SettingsTrial]]) -> Sequence[SettingsTrial]:
    """Return the best candidate; several trials are combined by their geometric mean."""

    def step_ms(trials: Sequence[SettingsTrial]) -> float:
        return geometric_mean(trial.run.step_ms for trial in trials)

    def cpu_ms(trials: Sequence[SettingsTrial]) -> float:
        return geometric_mean(trial.run.cpu_ms_per_token for trial in trials)

    bound_ms = min(map(step_ms, candidates)) * EQUAL_SPEED_FACTOR
    return min((trials for trials in candidates if step_ms(trials) <= bound_ms), key=cpu_ms)
