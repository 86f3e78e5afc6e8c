"""Aggregation of the runs of each strategy: medians, ratios and agreement of the generated texts.

Greedy decoding of equal models gives equal texts as long as the order of the logits is equal. That
holds in fp32. In bf16, another order of summation flips near-ties, so that full models differ among
themselves too; their agreement is the yardstick for that of the other strategies.
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
    """Agreement of the texts of two runs.

    Attributes:
        equal_texts: fraction of requests with equal texts.
        equal_characters: fraction of characters that precede their request's first difference.
    """

    equal_texts: float
    equal_characters: float


def text_agreement(first: Texts, second: Texts) -> Agreement | None:
    """Return the agreement on requests that both runs completed; None if there are none."""
    pairs = [(first[name], second[name]) for name in first if name in second]
    if not pairs:
        return None
    equal = sum(a == b for a, b in pairs)
    lengths = sum(max(len(a), len(b)) for a, b in pairs)
    n_equal = sum(_common_prefix(a, b) for a, b in pairs)
    return Agreement(equal / len(pairs), n_equal / lengths if lengths else 1.0)


def mean_agreement(runs: Sequence[Texts], references: Sequence[Texts]) -> Agreement | None:
    """Return the mean over all pairs of a run and a reference, except a run with itself."""
    by_pair = [text_agreement(a, b) for a in runs for b in references if a is not b]
    agreements = [agreement for agreement in by_pair if agreement is not None]
    if not agreements:
        return None
    return Agreement(
        sum(agreement.equal_texts for agreement in agreements) / len(agreements),
        sum(agreement.equal_characters for agreement in agreements) / len(agreements),
    )


def _common_prefix(a: str, b: str) -> int:
    equal = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))
    return sum(1 for _ in equal)


Figures = Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class StrategyResult:
    """All runs of a strategy.

    Attributes:
        title: label in tables.
        runs: the runs in order.
    """

    title: str
    runs: tuple[StrategyRun, ...]

    def medians(self) -> dict[str, float | None]:
        """Return the median of each figure over the runs; None if no run has it."""
        by_run = [run.figures() for run in self.runs]
        return {name: _median([figures[name] for figures in by_run]) for name in by_run[0]}

    def spreads(self) -> dict[str, list[float]]:
        """Return minimum and maximum of each figure over the runs."""
        by_run = [run.figures() for run in self.runs]
        values = {name: _without_none([figures[name] for figures in by_run]) for name in by_run[0]}
        return {name: [min(given), max(given)] for name, given in values.items() if given}

    @property
    def texts(self) -> list[Mapping[str, str]]:
        """Generated texts of each run, by request."""
        return [
            {f"{r.tenant}-{r.number}": r.text for r in run.successful_results} for run in self.runs
        ]


def to_json(results: Mapping[str, StrategyResult], *, reference: str) -> dict[str, Any]:
    """Return the JSON figures by strategy: medians, spreads, agreement and details of each run.

    Args:
        results: results by strategy.
        reference: strategy with whose texts all are compared; its runs are compared with each
            other.
    """
    expected = results[reference].texts if reference in results else []
    figures: dict[str, Any] = {}
    for name, result in results.items():
        agreement = mean_agreement(result.texts, expected)
        figures[name] = {
            "title": result.title,
            **result.medians(),
            "failures": sum(run.figures()["failures"] or 0 for run in result.runs),
            "equal_texts": None if agreement is None else agreement.equal_texts,
            "equal_characters": None if agreement is None else agreement.equal_characters,
            "spread": result.spreads(),
            "runs": [run.figures() | {"details": run.details()} for run in result.runs],
        }
    return figures


def ratios(results: Mapping[str, Any], *, baseline: str) -> dict[str, dict[str, float]]:
    """Return the median ratio of each figure to that of a baseline strategy, by strategy.

    Only runs of the same repetition are compared, so that drift of the machine's speed cancels.
    """
    baseline_runs = results[baseline]["runs"]
    names = ("tokens_per_s", "ttft_p50_s", "tpot_p50_s", "cpu_s_per_token", "gb_s_per_token")
    return {
        strategy: {
            name: median(
                a[name] / b[name] for a, b in zip(result["runs"], baseline_runs, strict=False)
            )
            for name in names
            if all(run[name] for run in (*result["runs"], *baseline_runs))
        }
        for strategy, result in results.items()
    }


def _median(values: Sequence[float | None]) -> float | None:
    present = _without_none(values)
    return median(present) if present else None


def _without_none(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]
