"""How one batch's tokens are divided between prompts; only decides, without side effects.

Running sequences take one token each of a batch's budget; what is left goes to prompts. Handed out
in the order of arrival, the long prompts of one tenant would take all of it for many batches, and
a short one of another would wait for them. So it is divided between tenants by weight (max-min
fairness), and within a tenant in order. And as a batch is as slow for all as it is long, a tenant
that asks for little in it need not wait for a long one: beside such a tenant, the prompts of each
other take a fraction of the batch only. Tenants that all ask for much share whole batches.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

BESIDE_SHORT_FRACTION = 1 / 8
"""Largest fraction of a batch for one tenant's prompts beside a tenant that asks for no more."""

MIN_BESIDE_SHORT = 32
"""That many tokens may be, however small batches are: they cost hardly more than one."""


@dataclass(frozen=True, slots=True)
class PendingPrompt:
    """A prompt, or what is left of it.

    Attributes:
        request_id: its request.
        tenant: whose it is.
        n_tokens: tokens that are not computed yet.
    """

    request_id: str
    tenant: str
    n_tokens: int


def divide_prompt_tokens(
    prompts: Sequence[PendingPrompt],
    running_tenants: Collection[str],
    *,
    max_tokens: int,
    weight: Callable[[str], float],
) -> Mapping[str, int]:
    """Return how many tokens of each prompt the next batch computes; without any it is left out.

    Args:
        prompts: in the order of their arrival.
        running_tenants: the tenant of each sequence that generates a token in this batch.
        max_tokens: tokens of a batch.
        weight: returns the weight of a tenant; asked once, as it may change meanwhile.
    """
    asked: Counter[str] = Counter()
    for prompt in prompts:
        asked[prompt.tenant] += prompt.n_tokens
    running = Counter(running_tenants)
    part = max(MIN_BESIDE_SHORT, int(max_tokens * BESIDE_SHORT_FRACTION))
    short = {t for t in {*asked, *running} if asked[t] + running[t] <= part}
    limits = {
        tenant: min(n_tokens, part) if short - {tenant} else n_tokens
        for tenant, n_tokens in asked.items()
    }
    weights = {tenant: weight(tenant) for tenant in limits}
    shares = _max_min_shares(limits, max(0, max_tokens - running.total()), weights)
    return _in_order(prompts, shares)


def _max_min_shares(
    limits: Mapping[str, int], budget: int, weights: Mapping[str, float]
) -> dict[str, int]:
    """Return each tenant's tokens: by weight, and what one leaves goes to the others."""
    shares: dict[str, int] = {}
    by_need = sorted(limits, key=lambda tenant: limits[tenant] / weights[tenant])
    weights_left = sum(weights.values())
    for tenant in by_need:
        fair = round(budget * weights[tenant] / weights_left)
        shares[tenant] = min(limits[tenant], max(min(1, budget), fair), budget)
        budget -= shares[tenant]
        weights_left -= weights[tenant]
    return shares


def _in_order(prompts: Sequence[PendingPrompt], shares: Mapping[str, int]) -> dict[str, int]:
    """Return each prompt's tokens; tenants with the smallest shares come first."""
    left = dict(shares)
    by_tenant: defaultdict[str, list[PendingPrompt]] = defaultdict(list)
    for prompt in prompts:
        by_tenant[prompt.tenant].append(prompt)
    parts: dict[str, int] = {}
    for tenant in sorted(by_tenant, key=lambda tenant: shares[tenant]):
        for prompt in by_tenant[tenant]:
            n_tokens = min(prompt.n_tokens, left[tenant])
            if n_tokens:
                parts[prompt.request_id] = n_tokens
                left[tenant] -= n_tokens
    return parts
