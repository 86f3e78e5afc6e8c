import pytest
from kube_objects import an_object

from faasmoe_operator.kube.counts import CoreCounts
from faasmoe_operator.kube.functions_state import (
    active_verdict,
    functions_verdict,
    tenants_verdict,
)
from faasmoe_operator.kube.kinds import POD, Object
from faasmoe_operator.kube.verdict import Verdict, bad
from faasmoe_operator.spec.tenants import Tenant

IDLE = CoreCounts(functions=72)
UNSCHEDULED = an_object(
    POD,
    "s",
    status={"conditions": [{"type": "PodScheduled", "status": "False", "message": "full"}]},
)


@pytest.mark.parametrize(
    ("counts", "pods", "fault", "expected"),
    [
        pytest.param(None, [], None, ("Unknown", "Planning"), id="no-core-yet"),
        pytest.param(
            None,
            [],
            bad("GranularityInvalid", "granularity: 7"),
            ("False", "GranularityInvalid"),
            id="no-plan",
        ),
        pytest.param(IDLE, [], None, ("True", "Planned"), id="at-zero"),
        pytest.param(IDLE, [UNSCHEDULED], None, ("False", "Unschedulable"), id="too-large"),
        pytest.param(
            CoreCounts(trouble="no quota"),
            [],
            None,
            ("False", "SandboxesUnavailable"),
            id="refused",
        ),
    ],
)
def test_functions_are_ready_when_they_can_be_had(
    counts: CoreCounts | None, pods: list[Object], fault: Verdict | None, expected: tuple[str, str]
) -> None:
    verdict = functions_verdict(counts, pods, fault=fault)
    assert (verdict.status, verdict.reason) == expected


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        (None, ("Unknown", "Planning")),
        (IDLE, ("False", "NoTraffic")),
        (CoreCounts(functions=72, active=2, replicas=3), ("True", "Serving")),
    ],
)
def test_a_model_is_active_while_a_function_has_a_replica(
    counts: CoreCounts | None, expected: tuple[str, str]
) -> None:
    verdict = active_verdict(counts)
    assert (verdict.status, verdict.reason) == expected


def test_says_which_tenant_lacks_which_secret() -> None:
    tenants = [
        Tenant.model_validate({"name": name, "apiKeysSecretRef": {"name": f"{name}-keys"}})
        for name in ("acme", "beta")
    ]
    verdict = tenants_verdict(tenants, CoreCounts(tenant_keys={"acme": 1, "beta": 0}))
    assert verdict.reason == "KeysMissing"
    assert "tenant beta has no key: Secret beta-keys is missing or empty" in verdict.message
    assert "acme" not in verdict.message


def test_no_tenants_is_fine_and_said() -> None:
    assert tenants_verdict([], None).reason == "NoTenants"
