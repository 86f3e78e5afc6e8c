"""Which replicas have to go: those beyond the demand, and functions that nobody plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from faasmoe_operator.plan.actions import ActionReason, Detach
from faasmoe_operator.plan.fleet import Replica


def surplus(
    live: Mapping[str, Sequence[Replica]], wanted: Mapping[str, int], *, template_hash: str
) -> list[Detach]:
    """Return the replicas to detach; as many as are wanted go on serving.

    Only replicas that serve can go, and only as many as serve beyond what is wanted: one that is
    still being attached is waited for, be it the replacement of the one to go or itself surplus.
    Those of an old template go first, then the least recently used.
    """
    detaches: list[Detach] = []
    for function, replicas in live.items():
        n_wanted = wanted.get(function)
        serving = sorted(
            (replica for replica in replicas if replica.serves),
            key=lambda replica: _first_to_go(replica, template_hash),
        )
        for replica in serving[: max(0, len(serving) - (n_wanted or 0))]:
            outdated = replica.sandbox.template_hash != template_hash
            reason = _reason(n_wanted, outdated=outdated)
            detaches.append(Detach(replica.sandbox.id, function, reason))
    return detaches


def _first_to_go(replica: Replica, template_hash: str) -> tuple[bool, float, str]:
    current = replica.sandbox.template_hash == template_hash
    return (current, replica.assignment.last_used, replica.sandbox.id)


def _reason(n_wanted: int | None, *, outdated: bool) -> ActionReason:
    if n_wanted is None:
        return ActionReason.NOT_PLANNED
    if outdated and n_wanted > 0:
        return ActionReason.TEMPLATE_CHANGED
    return ActionReason.SURPLUS
