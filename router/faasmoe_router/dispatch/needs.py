"""From how many tokens on a function is more likely called than not. Pure.

A prompt's routing is known only layer by layer, too late to start functions for it together. But a
function is spared only if not one of the prompt's n tokens picks any of its m of E experts in any
of its layers, which evenly spread top-k routing does with probability (1 - m/E) ** (k * n): for
blocks of a third of the experts and top-4 that is 20% at one token and 0.7% at three; even a single
expert of 60 is likely called from 11 tokens on. So any prompt of more than a few tokens needs all
functions of all layers. What is waited for needlessly costs its activation, in parallel with the
others; what is not waited for stalls the whole batch in the middle. Hence the break at one half.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from faasmoe_expert.store import Store
from faasmoe_expert.table import FunctionSpec

LIKELY = 0.5


def tokens_until_likely(n_held: int, layers: Sequence[tuple[int, int]]) -> int:
    """Return the fewest tokens that probably need a function.

    Args:
        n_held: experts that the function holds in each of its layers.
        layers: experts and top-k of each of its layers.
    """
    log_spared = 0.0  # of the probability that one token passes the function by
    for n_experts, top_k in layers:
        if n_held >= n_experts:
            return 1
        log_spared += top_k * math.log1p(-n_held / n_experts)
    return max(1, math.ceil(math.log(1 - LIKELY) / log_spared))


def needs_of(spec: FunctionSpec, store: Store) -> int:
    """Return the fewest tokens that probably need this function of the store's model."""
    layers = [store.manifest.layers[index] for index in spec.layers]
    return tokens_until_likely(len(spec.experts), [(x.num_experts, x.top_k) for x in layers])
