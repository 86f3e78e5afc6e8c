"""Whose prompts may share the KV cache of a common beginning. Pure.

That a prompt begins as an earlier one did shows in its time to the first token, so tenants share
nothing unless they say so of each other, all of them: if a and b name each other and b and c do,
but a and c do not, then a block that b computes would tell a of c, so none of the three shares.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from faasmoe_router.tenants.document import Tenant


def prefix_groups(tenants: Iterable[Tenant]) -> dict[str, str]:
    """Return the group of each tenant, named after its members; alone unless all agree."""
    named = {tenant.name: set(tenant.share_prefix_cache_with) for tenant in tenants}
    mutual = {
        name: {other for other in others if name in named.get(other, ())} - {name}
        for name, others in named.items()
    }
    groups = {}
    for name, others in mutual.items():
        circle = others | {name}
        agree = all(mutual[member] | {member} == circle for member in circle)
        groups[name] = ",".join(sorted(circle)) if agree else name
    return groups


def half_agreed(tenants: Iterable[Tenant], groups: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return the pairs in which the first names the second, and yet they do not share."""
    return [
        (tenant.name, other)
        for tenant in tenants
        for other in tenant.share_prefix_cache_with
        if groups.get(other) != groups[tenant.name]
    ]
