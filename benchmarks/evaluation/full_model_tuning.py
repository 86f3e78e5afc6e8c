"""The full model's best settings on this machine, found as benchmarks/baseline_tuning.py finds them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from benchmarks.alternating_runs import draw_prompts
from benchmarks.baseline_tuning import (
    BATCHED_MM,
    DEFAULT_WAIT_POLICY,
    PASSIVE_WAIT_POLICY,
    running_baseline,
    running_best_baseline,
)
from benchmarks.evaluation.models import BenchmarkModel

TRIAL_TOKENS = 16


@dataclass(frozen=True, slots=True)
class FullModelSettings:
    """Settings of the full model.

    Attributes:
        implementation: transformers' experts implementation, by requests in a batch.
        wait: how threads wait for work.
    """

    implementation: Callable[[int], str]
    wait_policy: str


DEFAULT_SETTINGS = FullModelSettings(lambda _: "grouped_mm", DEFAULT_WAIT_POLICY)
"""What was best in every trial so far, for runs whose figures mean nothing."""


async def tune_full_model(model: BenchmarkModel, batches: Sequence[int]) -> FullModelSettings:
    """Try every setting at each batch size.

    `batched_mm` is left out: it copies the weights of each pair, and the prefill of a prompt has
    hundreds of those.
    """
    config = json.loads((model.store / "model" / "config.json").read_text(encoding="utf-8"))
    start = partial(running_baseline, model.checkpoint, max_model_len=model.max_model_len)
    prompts = {b: draw_prompts(b, vocabulary=config["vocab_size"], seed=-1) for b in batches}
    print("settings of the full model", flush=True)
    tuning = running_best_baseline(
        start,
        (DEFAULT_WAIT_POLICY, PASSIVE_WAIT_POLICY),
        prompts,
        max_tokens=TRIAL_TOKENS,
        fits=lambda implementation, _: implementation != BATCHED_MM,
    )
    async with tuning as (_, choice):
        return FullModelSettings(choice.implementations.__getitem__, choice.wait_policy)
