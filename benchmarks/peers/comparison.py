"""Figures of all visits: medians with spread, and ratios of the servers round by round.

A ratio compares two servers within a round, which cancels slow drift of the machine.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.peers.visit import BF16, BatchFigures, Visit
from benchmarks.report import Spread

OURS = "FaaSMoE"
PEER = "llama.cpp"
VLLM = "vLLM"
OURS_VLLM = "FaaSMoE, engine vllm"
MIN_FIRST_TOKEN_AGREEMENT = 0.5  # random weights have close scores; a broken server agrees on none

Measure = Callable[[BatchFigures], float | None]
_RATIOS: Mapping[str, Measure] = {
    "tokens_ratio": lambda batch: batch.tokens_per_s,
    "ttft_ratio": lambda batch: batch.ttft_ms,
    "short_ttft_ratio": lambda batch: batch.short_ttft_ms,
    "tpot_ratio": lambda batch: batch.tpot_ms,
    "cpu_ratio": lambda batch: batch.cpu_ms_per_token,
}
KEY_PREFIXES = {"qwen": "", "demo": "demo_", "demo-checkpoint": "demo_checkpoint_", "tiny": "tiny_"}


@dataclass(frozen=True, slots=True)
class Cell:
    """A server with a model in a precision."""

    server: str
    model: str
    precision: str


Visits = Mapping[Cell, Sequence[Visit]]


def visit_order(cells: Sequence[Cell], round_number: int) -> list[Cell]:
    """Return the order of a round: reversed in every other one, models and precisions together."""
    groups = [
        list(group) for _, group in itertools.groupby(cells, lambda c: (c.model, c.precision))
    ]
    return [cell for group in groups for cell in (group if round_number % 2 == 0 else group[::-1])]


def ratios(ours: Sequence[Visit], peer: Sequence[Visit], measure: Measure) -> dict[str, Spread]:
    """Return ours over the peer's by concurrency, where both have the figure in a round."""
    found: dict[int, list[float]] = {}
    for a, b in zip(ours, peer, strict=False):
        for concurrency in a.batches.keys() & b.batches.keys():
            numerator, denominator = (measure(visit.batches[concurrency]) for visit in (a, b))
            if numerator is not None and denominator:
                found.setdefault(concurrency, []).append(numerator / denominator)
    return {str(c): Spread.from_values(values) for c, values in sorted(found.items())}


def ratio_figures(visits: Visits) -> dict[str, Any]:
    """Return the medians of all ratios, and their spreads under the key `spread`.

    The Qwen geometry has `tokens_ratio.<precision>.<batch>`, the other models a prefix, and ratios
    over vLLM the prefix `vllm_` after that.
    """
    figures: dict[str, Any] = {}
    spreads: dict[str, Any] = {}
    for cell, ours in visits.items():
        for peer, peer_prefix in ((PEER, ""), (VLLM, "vllm_")):
            theirs = visits.get(Cell(peer, cell.model, cell.precision))
            if cell.server != OURS or not theirs:
                continue
            for name, measure in _RATIOS.items():
                key = KEY_PREFIXES[cell.model] + peer_prefix + name
                if by_batch := ratios(ours, theirs, measure):
                    spreads.setdefault(key, {})[cell.precision] = by_batch
                    figures.setdefault(key, {})[cell.precision] = {
                        batch: spread.median for batch, spread in by_batch.items()
                    }
    for key, by_precision in vllm_ratios(visits).items():
        spreads[key] = by_precision
        figures[key] = {
            precision: {batch: spread.median for batch, spread in by_batch.items()}
            for precision, by_batch in by_precision.items()
        }
    return {**figures, "spread": spreads}


def vllm_ratios(visits: Visits) -> dict[str, dict[str, dict[str, Spread]]]:
    """Return tokens/s of our vLLM engine over vLLM with its own experts, by key and precision.

    The key is `vllm_ratio` with the model's prefix; the precision `same` is vLLM's own, bf16
    weights, and any other is that of the functions.
    """
    found: dict[str, dict[str, dict[str, Spread]]] = {}
    for cell, ours in visits.items():
        own = visits.get(Cell(VLLM, cell.model, BF16))
        if cell.server != OURS_VLLM or not own:
            continue
        precision = "same" if cell.precision == BF16 else cell.precision
        key = f"{KEY_PREFIXES[cell.model]}vllm_ratio"
        found.setdefault(key, {})[precision] = ratios(ours, own, _RATIOS["tokens_ratio"])
    return found


def best_ratios(visits: Visits) -> dict[str, dict[str, float]]:
    """Return, by model and batch, our best precision's tokens/s over llama.cpp's best."""
    best: dict[str, dict[str, float]] = {}
    for model in dict.fromkeys(cell.model for cell in visits):
        speeds = {
            server: _best_speeds(v for c, v in visits.items() if (c.server, c.model) == key)
            for server in (OURS, PEER)
            for key in [(server, model)]
        }
        common = speeds[OURS].keys() & speeds[PEER].keys()
        if common:
            best[model] = {str(c): speeds[OURS][c] / speeds[PEER][c] for c in sorted(common)}
    return best


def _best_speeds(cells: Iterable[Sequence[Visit]]) -> dict[int, float]:
    best: dict[int, float] = {}
    for runs in cells:
        for concurrency in runs[0].batches:
            speed = statistics.median(run.batches[concurrency].tokens_per_s for run in runs)
            best[concurrency] = max(best.get(concurrency, 0.0), speed)
    return best


def cell_figures(visits: Sequence[Visit]) -> dict[str, Any]:
    """Return the figures of one server with one model in one precision."""
    batches = {
        str(concurrency): {
            name: Spread.from_values(values)
            for name in BatchFigures.__slots__
            if (values := _values(visits, concurrency, name))
        }
        for concurrency in visits[0].batches
    }
    return {
        "start_s": Spread.from_values([v.start_s for v in visits]),
        "pss_mib": Spread.from_values([v.pss_bytes / 2**20 for v in visits]),
        "rest_pss_mib": _rest_pss_mib(visits),
        "other_cores": Spread.from_values([v.other_cores for v in visits]),
        "batches": batches,
        "details": visits[0].details,
        "rounds": len(visits),
    }


def _rest_pss_mib(visits: Sequence[Visit]) -> Spread | None:
    known = [v.rest_pss_bytes / 2**20 for v in visits if v.rest_pss_bytes is not None]
    return Spread.from_values(known) if known else None


def _values(visits: Sequence[Visit], concurrency: int, name: str) -> list[float]:
    values = [getattr(visit.batches[concurrency], name) for visit in visits]
    return [value for value in values if value is not None]


def agreement(ours: Sequence[Sequence[str]], theirs: Sequence[Sequence[str]]) -> dict[str, float]:
    """Compare the greedy tokens of the same prompts.

    Returns:
        The fraction of equal first tokens, and the mean fraction of a response's tokens before its
        first difference. llama.cpp merges tokens that are parts of one character, so that it may
        list fewer.
    """
    pairs = list(zip(ours, theirs, strict=True))
    prefixes = [_common_prefix(a, b) / len(a) for a, b in pairs]
    return {
        "first_tokens": sum(a[0] == b[0] for a, b in pairs) / len(pairs),
        "prefix": sum(prefixes) / len(prefixes),
    }


def _common_prefix(first: Sequence[str], second: Sequence[str]) -> int:
    equal = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    return sum(1 for _ in equal)


def agreements(visits: Visits) -> dict[str, dict[str, dict[str, float]]]:
    """Return our agreement with each peer in bf16, by model and server."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for cell, theirs in visits.items():
        ours = visits.get(Cell(OURS, cell.model, BF16))
        if cell.precision == BF16 and cell.server in (PEER, VLLM) and ours:
            found.setdefault(cell.model, {})[cell.server] = agreement(
                ours[0].tokens, theirs[0].tokens
            )
    return found


def disagreements(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    """Return a message for each pair of servers whose first tokens hardly agree."""
    return [
        f"{model}: {server} agrees with FaaSMoE on {values['first_tokens']:.0%} of first tokens, "
        f"expected {MIN_FIRST_TOKEN_AGREEMENT:.0%}: one of both answers wrongly"
        for model, servers in found.items()
        for server, values in servers.items()
        if values["first_tokens"] < MIN_FIRST_TOKEN_AGREEMENT
    ]
