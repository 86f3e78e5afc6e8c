"""Whether functions serve, whether any is active, and whether tenants have keys. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from faasmoe_operator.kube.counts import CoreCounts
from faasmoe_operator.kube.kinds import Object
from faasmoe_operator.kube.pod_trouble import trouble_of
from faasmoe_operator.kube.verdict import Verdict, bad, good, pending
from faasmoe_operator.spec.tenants import Tenant

PLANNING = "Planning"
WAITING_FOR_ROUTER = "WaitingForRouter"


def functions_verdict(
    counts: CoreCounts | None, sandboxes: Sequence[Object], *, fault: Verdict | None
) -> Verdict:
    """Return the state of the condition FunctionsReady: they serve, or can when they are called.

    Args:
        counts: what the control core counts; None before it has started.
        sandboxes: the sandboxes' pods.
        fault: why the functions cannot be planned.
    """
    if fault is not None:
        return fault
    if counts is None:
        return pending(PLANNING, "the functions are about to be planned")
    if (trouble := trouble_of(sandboxes)) is not None:
        return bad(trouble.reason, trouble.message)
    if counts.trouble:
        return bad("SandboxesUnavailable", counts.trouble)
    cut = f"the experts are cut into {counts.functions} functions"
    return good("Planned", f"{cut}; one without a replica gets one when it is called")


def active_verdict(counts: CoreCounts | None) -> Verdict:
    """Return the state of the condition Active."""
    if counts is None:
        return pending(PLANNING, "the functions are about to be planned")
    if counts.active == 0:
        return Verdict("False", "NoTraffic", "no function has a replica: nobody calls the model")
    return good("Serving", f"{counts.active} functions have {counts.replicas} replicas")


def tenants_verdict(tenants: Sequence[Tenant], counts: CoreCounts | None) -> Verdict:
    """Return the state of the condition TenantsReady: each tenant has a key.

    Args:
        tenants: the tenants asked for.
        counts: what the control core counts, with the keys that routers report.
    """
    if not tenants:
        return good("NoTenants", "spec.tenants is empty: whoever reaches the router may use it")
    if counts is None or counts.tenant_keys is None:
        return pending(WAITING_FOR_ROUTER, "no router has said yet how many keys tenants have")
    without = [tenant for tenant in tenants if not counts.tenant_keys.get(tenant.name)]
    if not without:
        return good("KeysFound", f"{len(tenants)} tenants have keys")
    return bad("KeysMissing", "; ".join(_without_keys(tenant) for tenant in without))


def _without_keys(tenant: Tenant) -> str:
    reference = tenant.api_keys_secret_ref
    secret = "that it names" if reference is None else reference.name
    what = f"tenant {tenant.name} has no key: Secret {secret} is missing or empty"
    return f"{what}; create it with one entry for each key"
