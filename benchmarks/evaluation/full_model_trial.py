"""The full model's best settings on this machine, found as benchmarks/trial.py finds them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from benchmarks.comparison import draw_prompts
from benchmarks.evaluation.models import Model
from benchmarks.trial import BATCHED, DEFAULT_WAIT, PASSIVE_WAIT, best_in_process, in_process

TRIAL_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Best:
    """Settings of the full model.

    Attributes:
        implementation: transformers' experts implementation, by requests in a batch.
        wait: how threads wait for work.
    """

    implementation: Callable[[int], str]
    wait: str


UNTRIED = Best(lambda _: "grouped_mm", DEFAULT_WAIT)
"""What was best in every trial so far, for runs whose figures mean nothing."""


async def find_best(model: Model, batches: Sequence[int]) -> Best:
    """Try every setting at each batch size.

    `batched_mm` is left out: it copies the weights of each pair, and the prefill of a prompt has
    hundreds of those.
    """
    config = json.loads((model.store / "model" / "config.json").read_text(encoding="utf-8"))
    start = partial(in_process, model.checkpoint, max_model_len=model.max_model_len)
    prompts = {b: draw_prompts(b, vocabulary=config["vocab_size"], seed=-1) for b in batches}
    print("settings of the full model", flush=True)
    trying = best_in_process(
        start,
        (DEFAULT_WAIT, PASSIVE_WAIT),
        prompts,
        max_tokens=TRIAL_TOKENS,
        fits=lambda implementation, _: implementation != BATCHED,
    )
    async with trying as (_, choice):
        return Best(choice.implementations.__getitem__, choice.wait)
