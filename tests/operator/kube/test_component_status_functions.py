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
    ("counts", "pods", "runtime_failure", "expected"),
    [
        pytest.param(None, [], None, ("Unknown", "Planning"), id="not-started"),
        pytest.param(
            None,
            [],
            condition_false("GranularityInvalid", "granularity: 7"),
            ("False", "GranularityInvalid"),
            id="invalid-granularity",
        ),
        pytest.param(IDLE, [], None, ("True", "Planned"), id="scaled-to-zero"),
        pytest.param(IDLE, [UNSCHEDULED], None, ("False", "Unschedulable"), id="unschedulable"),
        pytest.param(
            RuntimeCounts(failure="no quota"),
            [],
            None,
            ("False", "SandboxesUnavailable"),
            id="rejected",
        ),
    ],
)
def test_functions_condition_by_counts_and_failures(
    counts: RuntimeCounts | None,
    pods: list[Object],
    runtime_failure: ConditionState | None,
    expected: tuple[str, str],
) -> None:
    state = functions_condition(
        counts, pods, runtime_failure=runtime_failure, wall_clock_s=1_788_000_000.0
    )
    assert (state.status, state.reason) == expected


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        (None, ("Unknown", "Planning")),
        (IDLE, ("False", "NoTraffic")),
        (RuntimeCounts(functions=72, active=2, replicas=3), ("True", "Serving")),
    ],
)
def test_active_while_a_function_has_a_replica(
    counts: RuntimeCounts | None, expected: tuple[str, str]
) -> None:
    state = active_condition(counts)
    assert (state.status, state.reason) == expected


def test_names_tenants_without_keys_and_their_secrets() -> None:
    tenants = [
        TenantSpec.model_validate({"name": name, "apiKeysSecretRef": {"name": f"{name}-keys"}})
        for name in ("acme", "beta")
    ]
    state = tenants_condition(tenants, RuntimeCounts(tenant_keys={"acme": 1, "beta": 0}))
    assert state.reason == "KeysMissing"
    assert "tenant beta has no key: Secret beta-keys is missing or empty" in state.message
    assert "acme" not in state.message


def test_tenants_ready_without_tenants() -> None:
    assert tenants_condition([], None).reason == "NoTenants"
