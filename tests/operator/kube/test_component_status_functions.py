import pytest
from kube_objects import make_object

from faasmoe_operator.api.v1alpha1.tenants import TenantSpec
from faasmoe_operator.kube.component_status import (
    RuntimeCounts,
    active_condition,
    functions_condition,
    tenants_condition,
)
from faasmoe_operator.kube.conditions import ConditionState, condition_false
from faasmoe_operator.kube.types import POD, Object

IDLE = RuntimeCounts(functions=72)
UNSCHEDULED = make_object(
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
            condition_false("GranularityInvalid", "granularity: 7"),
            ("False", "GranularityInvalid"),
            id="no-plan",
        ),
        pytest.param(IDLE, [], None, ("True", "Planned"), id="at-zero"),
        pytest.param(IDLE, [UNSCHEDULED], None, ("False", "Unschedulable"), id="too-large"),
        pytest.param(
            RuntimeCounts(failure="no quota"),
            [],
            None,
            ("False", "SandboxesUnavailable"),
            id="refused",
        ),
    ],
)
def test_functions_are_ready_when_they_can_be_had(
    counts: RuntimeCounts | None,
    pods: list[Object],
    fault: ConditionState | None,
    expected: tuple[str, str],
) -> None:
    verdict = functions_condition(counts, pods, runtime_failure=fault)
    assert (verdict.status, verdict.reason) == expected


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        (None, ("Unknown", "Planning")),
        (IDLE, ("False", "NoTraffic")),
        (RuntimeCounts(functions=72, active=2, replicas=3), ("True", "Serving")),
    ],
)
def test_a_model_is_active_while_a_function_has_a_replica(
    counts: RuntimeCounts | None, expected: tuple[str, str]
) -> None:
    verdict = active_condition(counts)
    assert (verdict.status, verdict.reason) == expected


def test_says_which_tenant_lacks_which_secret() -> None:
    tenants = [
        TenantSpec.model_validate({"name": name, "apiKeysSecretRef": {"name": f"{name}-keys"}})
        for name in ("acme", "beta")
    ]
    verdict = tenants_condition(tenants, RuntimeCounts(tenant_keys={"acme": 1, "beta": 0}))
    assert verdict.reason == "KeysMissing"
    assert "tenant beta has no key: Secret beta-keys is missing or empty" in verdict.message
    assert "acme" not in verdict.message


def test_no_tenants_is_fine_and_said() -> None:
    assert tenants_condition([], None).reason == "NoTenants"
