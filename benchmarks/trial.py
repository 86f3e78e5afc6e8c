"""The in-process side's settings: each is tried, the best is kept, for each batch size its own."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean

from benchmarks.decoding import Run, equal_fraction
from benchmarks.sides import Side, running

BATCHED = "batched_mm"
IMPLEMENTATIONS = ("grouped_mm", "eager", BATCHED)
DEFAULT_WAIT, PASSIVE_WAIT = "default", "PASSIVE"
EQUALLY_FAST = 1.02  # within this, the setting that takes less processor time is the better one

Prompts = Sequence[Sequence[int]]
Start = Callable[[str], AbstractAsyncContextManager[Side]]


@dataclass(frozen=True, slots=True)
class Trial:
    """What one setting gave at one batch size.

    Attributes:
        wait: how OpenMP's threads wait for work, fixed when the process starts.
        implementation: transformers' experts implementation.
        run: what it gave.
    """

    wait: str
    implementation: str
    run: Run

    def text(self) -> str:
        """Return it as a line."""
        return (
            f"batch {self.run.batch}, {self.implementation}, wait {self.wait}: "
            f"{self.run.step_ms:.1f} ms a step, {self.run.cpu_ms_per_token:.1f} CPU ms a token"
        )


@dataclass(frozen=True, slots=True)
class Choice:
    """The best settings: one way to wait, and for each batch size an implementation.

    Attributes:
        wait: for the whole process.
        implementations: by batch size.
        trials: everything that was tried.
    """

    wait: str
    implementations: Mapping[int, str]
    trials: tuple[Trial, ...]

    def own_agreement(self, batch: int) -> float:
        """Return the part of tokens on which the in-process implementations agree themselves."""
        runs = [t.run.tokens for t in self.trials if t.run.batch == batch and t.wait == self.wait]
        return min((equal_fraction(runs[0], other) for other in runs[1:]), default=1.0)


@asynccontextmanager
async def in_process(checkpoint: Path, wait: str, *, max_model_len: int) -> AsyncIterator[Side]:
    """Run the in-process side as long as the context lasts."""
    environment = dict(os.environ)
    if wait != DEFAULT_WAIT:
        environment["OMP_WAIT_POLICY"] = wait
    arguments = (str(checkpoint), "--max-model-len", str(max_model_len))
    async with running("benchmarks.in_process", *arguments, environment=environment) as side:
        yield side


@asynccontextmanager
async def best_in_process(
    start: Start,
    waits: Sequence[str],
    prompts: Mapping[int, Prompts],
    *,
    max_tokens: int,
    fits: Callable[[str, int], bool],
) -> AsyncIterator[tuple[Side, Choice]]:
    """Try every setting; run the in-process side with the best as long as the context lasts.

    Args:
        start: starts the in-process side with a way to wait.
        waits: the ways to try.
        prompts: what each batch size is tried with.
        max_tokens: tokens that each request generates in a trial.
        fits: whether an implementation has the memory for a batch of so many prompts.
    """
    trials: list[Trial] = []
    async with AsyncExitStack() as stack:
        for wait in waits:
            await stack.aclose()  # the weights of one process at a time
            side = await stack.enter_async_context(start(wait))
            for batch, texts in prompts.items():
                for implementation in IMPLEMENTATIONS:
                    if fits(implementation, batch):
                        await side.run(texts, max_tokens=4, implementation=implementation)
                        run = await side.run(
                            texts, max_tokens=max_tokens, implementation=implementation
                        )
                        trials.append(Trial(wait, implementation, run))
                        print(f"  {trials[-1].text()}")
        choice = best(trials)
        if choice.wait != waits[-1]:
            await stack.aclose()
            side = await stack.enter_async_context(start(choice.wait))
        yield side, choice


def best(trials: Sequence[Trial]) -> Choice:
    """Return the settings with the least time; of almost equal ones, that with less CPU time."""
    by_wait: dict[str, dict[int, Trial]] = {}
    for wait, batch in dict.fromkeys((t.wait, t.run.batch) for t in trials):
        tried = [[t] for t in trials if (t.wait, t.run.batch) == (wait, batch)]
        (by_wait.setdefault(wait, {})[batch],) = _best(tried)
    chosen = _best([list(found.values()) for found in by_wait.values()])
    implementations = {trial.run.batch: trial.implementation for trial in chosen}
    return Choice(chosen[0].wait, implementations, tuple(trials))


def _best(candidates: Sequence[Sequence[Trial]]) -> Sequence[Trial]:
    """Return the best candidate; one with several trials counts by their geometric mean."""

    def step_ms(trials: Sequence[Trial]) -> float:
        return geometric_mean(trial.run.step_ms for trial in trials)

    def cpu_ms(trials: Sequence[Trial]) -> float:
        return geometric_mean(trial.run.cpu_ms_per_token for trial in trials)

    bound_ms = min(map(step_ms, candidates)) * EQUALLY_FAST
    return min((trials for trials in candidates if step_ms(trials) <= bound_ms), key=cpu_ms)
