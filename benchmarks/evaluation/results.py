"""How far two runs wrote the same, request by request. Pure.

Greedy texts of equal models are equal as long as the scores' order is. With fp32 it is; with bf16
sums that are added in another order move near-ties, so full models differ among themselves too, and
what they agree on is the measure.

A whole benchmark's results: every strategy's runs, and what they come to. Pure but for files.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.evaluation.run import StrategyRun

Texts = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far texts agree.

    Attributes:
        equal_texts: the part of requests whose whole text is the same.
        equal_characters: the part of characters before the first difference of their request.
    """

    equal_texts: float
    equal_characters: float


def text_agreement(first: Texts, second: Texts) -> Agreement | None:
    """Return how far the texts of requests that both answered agree; None if there is none."""
    pairs = [(first[name], second[name]) for name in first if name in second]
    if not pairs:
        return None
    equal = sum(a == b for a, b in pairs)
    lengths = sum(max(len(a), len(b)) for a, b in pairs)
    same = sum(_common_prefix(a, b) for a, b in pairs)
    return Agreement(equal / len(pairs), same / lengths if lengths else 1.0)


def mean_agreement(runs: Sequence[Texts], references: Sequence[Texts]) -> Agreement | None:
    """Return the mean over all pairs of a run and a reference, but for a run with itself."""
    found = [text_agreement(a, b) for a in runs for b in references if a is not b]
    agreements = [one for one in found if one is not None]
    if not agreements:
        return None
    return Agreement(
        sum(one.equal_texts for one in agreements) / len(agreements),
        sum(one.equal_characters for one in agreements) / len(agreements),
    )


def _common_prefix(a: str, b: str) -> int:
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))
    return sum(1 for _ in same)


Figures = Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class StrategyResult:
    """What a strategy gave in all its runs.

    Attributes:
        title: what tables call it.
        runs: its runs, in order.
    """

    title: str
    runs: tuple[StrategyRun, ...]

    def medians(self) -> dict[str, float | None]:
        """Return the median over the runs of each figure; None is what did not occur."""
        found = [run.figures() for run in self.runs]
        return {name: _median([figures[name] for figures in found]) for name in found[0]}

    def spreads(self) -> dict[str, list[float]]:
        """Return the least and the most of each figure."""
        found = [run.figures() for run in self.runs]
        values = {name: _without_none([figures[name] for figures in found]) for name in found[0]}
        return {name: [min(held), max(held)] for name, held in values.items() if held}

    @property
    def texts(self) -> list[Mapping[str, str]]:
        """Return what each run wrote, by request."""
        return [
            {f"{a.tenant}-{a.number}": a.text for a in run.successful_results} for run in self.runs
        ]


def to_json(results: Mapping[str, StrategyResult], *, reference: str) -> dict[str, Any]:
    """Return an object by strategy: medians, their spreads, exactness, and details of each run.

    Args:
        results: by strategy.
        reference: the strategy whose texts the others' are compared with; its own runs are compared
            with each other.
    """
    expected = results[reference].texts if reference in results else []
    found: dict[str, Any] = {}
    for name, result in results.items():
        agreement = mean_agreement(result.texts, expected)
        found[name] = {
            "title": result.title,
            **result.medians(),
            "failures": sum(run.figures()["failures"] or 0 for run in result.runs),
            "equal_texts": None if agreement is None else agreement.equal_texts,
            "equal_characters": None if agreement is None else agreement.equal_characters,
            "spread": result.spreads(),
            "runs": [run.figures() | {"details": run.details()} for run in result.runs],
        }
    return found


def ratios(results: Mapping[str, Any], *, baseline: str) -> dict[str, dict[str, float]]:
    """Return figures over those of another strategy in the same repetition, the median of those.

    Neighbours in time are compared, so that a ratio holds on a machine whose speed drifts.
    """
    others = results[baseline]["runs"]
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
    present = _without_none(values)
    return median(present) if present else None


def _without_none(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]
