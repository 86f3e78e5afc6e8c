"""A whole benchmark's results: every strategy's runs, and what they come to. Pure but for files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.evaluation.exactness import mean_agreement
from benchmarks.evaluation.run import Run

Figures = Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class Result:
    """What a strategy gave in all its runs.

    Attributes:
        title: what tables call it.
        runs: its runs, in order.
    """

    title: str
    runs: tuple[Run, ...]

    def medians(self) -> dict[str, float | None]:
        """Return the median over the runs of each figure; None is what did not occur."""
        found = [run.figures() for run in self.runs]
        return {name: _median([figures[name] for figures in found]) for name in found[0]}

    def spreads(self) -> dict[str, list[float]]:
        """Return the least and the most of each figure."""
        found = [run.figures() for run in self.runs]
        values = {name: _held([figures[name] for figures in found]) for name in found[0]}
        return {name: [min(held), max(held)] for name, held in values.items() if held}

    @property
    def texts(self) -> list[Mapping[str, str]]:
        """Return what each run wrote, by request."""
        return [{f"{a.tenant}-{a.number}": a.text for a in run.answered} for run in self.runs]


def to_json(results: Mapping[str, Result], *, reference: str) -> dict[str, Any]:
    """Return an object by strategy: medians, their spreads, exactness, and details of each run.

    Args:
        results: by strategy.
        reference: the strategy whose texts the others' are compared with; its own runs are compared
            with each other.
    """
    expected = results[reference].texts if reference in results else []
    found: dict[str, Any] = {}
    for name, result in results.items():
        exact = mean_agreement(result.texts, expected)
        found[name] = {
            "title": result.title,
            **result.medians(),
            "failures": sum(run.figures()["failures"] or 0 for run in result.runs),
            "equal_texts": None if exact is None else exact.equal_texts,
            "equal_characters": None if exact is None else exact.equal_characters,
            "spread": result.spreads(),
            "runs": [run.figures() | {"details": run.details()} for run in result.runs],
        }
    return found


def ratios(results: Mapping[str, Any], *, over: str) -> dict[str, dict[str, float]]:
    """Return figures over those of another strategy in the same repetition, the median of those.

    Neighbours in time are compared, so that a ratio holds on a machine whose speed drifts.
    """
    others = results[over]["runs"]
    names = ("tokens_per_s", "ttft_p50_s", "tpot_p50_s", "cpu_s_per_token", "gb_s_per_token")
    return {
        strategy: {
            name: median(a[name] / b[name] for a, b in zip(found["runs"], others, strict=False))
            for name in names
            if all(run[name] for run in (*found["runs"], *others))
        }
        for strategy, found in results.items()
    }


def _median(values: Sequence[float | None]) -> float | None:
    held = _held(values)
    return median(held) if held else None


def _held(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]
