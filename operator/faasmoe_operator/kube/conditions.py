"""Conditions of a MoEModel: every known one, always, and one that sums them up. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from faasmoe_operator.kube.kinds import Object
from faasmoe_operator.kube.verdict import Verdict, bad, good, pending

READY = "Ready"
STORE_READY = "StoreReady"
ROUTER_READY = "RouterReady"
FUNCTIONS_READY = "FunctionsReady"
ACTIVE = "Active"
TENANTS_READY = "TenantsReady"
PARTS = (STORE_READY, ROUTER_READY, FUNCTIONS_READY, TENANTS_READY)
"""What a model must have to be ready, in the order in which they come about."""


@dataclass(frozen=True, slots=True)
class Verdicts:
    """The state of each condition but Ready.

    Attributes:
        store: of the store.
        router: of the routers.
        functions: of the expert functions.
        tenants: of the tenants' keys.
        active: whether any function has a replica.
    """

    store: Verdict
    router: Verdict
    functions: Verdict
    tenants: Verdict
    active: Verdict

    @classmethod
    def all(cls, verdict: Verdict) -> Verdicts:
        """Return the same for every condition."""
        return cls(verdict, verdict, verdict, verdict, verdict)

    def by_type(self) -> dict[str, Verdict]:
        """Return them by the condition's type, without Ready."""
        return {
            STORE_READY: self.store,
            ROUTER_READY: self.router,
            FUNCTIONS_READY: self.functions,
            ACTIVE: self.active,
            TENANTS_READY: self.tenants,
        }


def summed_up(verdicts: Verdicts) -> Verdict:
    """Return the state of Ready: what is wrong, else what is under way, else that all is well."""
    by_type = verdicts.by_type()
    for status, make in (("False", bad), ("Unknown", pending)):
        for part in PARTS:
            if by_type[part].status == status:
                return make(by_type[part].reason, f"{part}: {by_type[part].message}")
    return good("Ready", "the model serves")


def conditions(
    verdicts: Mapping[str, Verdict], before: Iterable[Object], *, generation: int, now: str
) -> list[Object]:
    """Return the list for the status; times change only where a status flips.

    Args:
        verdicts: state by type.
        before: the conditions that the object has.
        generation: of the spec that they are about.
        now: the time, as RFC 3339 writes it.
    """
    known = {str(condition.get("type")): condition for condition in before}
    return [
        _condition(kind, verdict, known.get(kind), generation=generation, now=now)
        for kind, verdict in verdicts.items()
    ]


def _condition(
    kind: str, verdict: Verdict, before: Object | None, *, generation: int, now: str
) -> Object:
    flipped = before is None or before.get("status") != verdict.status
    since = now if before is None or flipped else before.get("lastTransitionTime", now)
    return {
        "type": kind,
        "status": verdict.status,
        "observedGeneration": generation,
        "lastTransitionTime": since,
        "reason": verdict.reason,
        "message": verdict.message,
    }
