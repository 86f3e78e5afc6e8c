from __future__ import annotations

from typing import Any

import pytest

from faasmoe_operator.scaling.activation import (
    ActivationState,
    Phase,
    activate,
    apply_scale_to_zero,
    initial_activation,
    observe_ready,
)
from faasmoe_operator.scaling.decision import Decision, Reason
from faasmoe_operator.scaling.settings import ScalingSettings

ZERO = Decision(0, Reason.STABLE)
NO_DATA = Decision(3, Reason.NO_DATA)


@pytest.mark.parametrize(
    ("replicas", "ready", "phase"),
    [(0, 0, Phase.INACTIVE), (2, 0, Phase.ACTIVATING), (2, 1, Phase.ACTIVE)],
)
def test_initial_phase_depends_on_assigned_and_ready_replicas(
    replicas: int, ready: int, phase: Phase
) -> None:
    assert initial_activation(replicas=replicas, ready=ready, now=5) == ActivationState(phase, 5)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(Phase.INACTIVE, ActivationState(Phase.ACTIVATING, 9), id="zero-begins"),
        pytest.param(
            Phase.DRAINING, ActivationState(Phase.ACTIVE, 9), id="draining-is-active-again"
        ),
        pytest.param(
            Phase.ACTIVATING, ActivationState(Phase.ACTIVATING, 1), id="activating-is-unchanged"
        ),
        pytest.param(Phase.ACTIVE, ActivationState(Phase.ACTIVE, 1), id="active-is-unchanged"),
    ],
)
def test_activate(before: Phase, after: ActivationState) -> None:
    assert activate(ActivationState(before, 1), now=9) == after


@pytest.mark.parametrize(
    ("before", "ready", "after"),
    [
        pytest.param(Phase.ACTIVATING, 1, ActivationState(Phase.ACTIVE, 9), id="became-ready"),
        pytest.param(Phase.ACTIVATING, 0, ActivationState(Phase.ACTIVATING, 1), id="not-ready-yet"),
        pytest.param(Phase.ACTIVE, 0, ActivationState(Phase.ACTIVATING, 9), id="lost-all-replicas"),
        pytest.param(Phase.ACTIVE, 2, ActivationState(Phase.ACTIVE, 1), id="active"),
        pytest.param(Phase.INACTIVE, 1, ActivationState(Phase.INACTIVE, 1), id="replica-at-zero"),
        pytest.param(Phase.DRAINING, 1, ActivationState(Phase.DRAINING, 1), id="draining"),
    ],
)
def test_observe_ready(before: Phase, ready: int, after: ActivationState) -> None:
    assert observe_ready(ActivationState(before, 1), ready=ready, now=9) == after


ZERO_DISABLED = {"enable_scale_to_zero": False}
SHORT = {"window_s": 10.0, "scale_to_zero_grace_period_s": 5.0, "progress_deadline_s": 100.0}
LAST_DESIRED = 2


def case(
    before: Phase,
    elapsed_s: float,
    kpa_decision: Decision,
    decision: Decision,
    after: Phase,
    name: str,
    **settings: Any,
) -> Any:
    return pytest.param(before, elapsed_s, kpa_decision, settings, decision, after, id=name)


CASES = [
    case(
        Phase.ACTIVE, 9.9, ZERO, Decision(1, Reason.STABLE_WINDOW), Phase.ACTIVE, "active-too-short"
    ),
    case(Phase.ACTIVE, 10, ZERO, Decision(1, Reason.GRACE_PERIOD), Phase.DRAINING, "drains"),
    case(
        Phase.ACTIVE,
        10,
        ZERO,
        Decision(0, Reason.NO_TRAFFIC),
        Phase.INACTIVE,
        "no-grace-period",
        scale_to_zero_grace_period_s=0,
    ),
    case(Phase.DRAINING, 4.9, ZERO, Decision(1, Reason.GRACE_PERIOD), Phase.DRAINING, "in-grace"),
    case(Phase.DRAINING, 5, ZERO, Decision(0, Reason.NO_TRAFFIC), Phase.INACTIVE, "grace-is-over"),
    case(
        Phase.DRAINING,
        5,
        ZERO,
        Decision(1, Reason.GRACE_PERIOD),
        Phase.DRAINING,
        "retention-is-longer",
        scale_to_zero_pod_retention_period_s=6,
    ),
    case(
        Phase.DRAINING,
        1,
        Decision(2, Reason.STABLE),
        Decision(2, Reason.STABLE),
        Phase.ACTIVE,
        "load-comes-back",
    ),
    case(
        Phase.INACTIVE,
        1,
        Decision(4, Reason.PANIC),
        Decision(4, Reason.PANIC),
        Phase.ACTIVATING,
        "load-without-activation",
    ),
    case(Phase.INACTIVE, 1, ZERO, Decision(0, Reason.NO_TRAFFIC), Phase.INACTIVE, "stays-at-zero"),
    case(
        Phase.ACTIVATING,
        99,
        ZERO,
        Decision(LAST_DESIRED, Reason.ACTIVATING),
        Phase.ACTIVATING,
        "starting-replica-is-kept",
    ),
    case(Phase.ACTIVATING, 100, ZERO, Decision(0, Reason.TIMED_OUT), Phase.INACTIVE, "timed-out"),
    case(
        Phase.ACTIVATING,
        100,
        NO_DATA,
        Decision(0, Reason.TIMED_OUT),
        Phase.INACTIVE,
        "timed-out-without-reports",
    ),
    case(
        Phase.ACTIVATING,
        1000,
        Decision(1, Reason.STABLE),
        Decision(1, Reason.STABLE),
        Phase.ACTIVATING,
        "no-timeout-while-requests-wait",
    ),
    case(Phase.ACTIVATING, 99, NO_DATA, NO_DATA, Phase.ACTIVATING, "no-data-keeps-activating"),
    case(Phase.ACTIVE, 99, NO_DATA, NO_DATA, Phase.ACTIVE, "no-data-keeps-active"),
    case(Phase.DRAINING, 99, NO_DATA, NO_DATA, Phase.DRAINING, "no-data-keeps-draining"),
    case(
        Phase.ACTIVE,
        99,
        ZERO,
        Decision(1, Reason.SCALE_TO_ZERO_DISABLED),
        Phase.ACTIVE,
        "zero-is-disabled",
        **ZERO_DISABLED,
    ),
    case(
        Phase.ACTIVATING,
        100,
        NO_DATA,
        NO_DATA,
        Phase.ACTIVATING,
        "no-timeout-if-zero-is-disabled",
        **ZERO_DISABLED,
    ),
    case(
        Phase.ACTIVATING,
        100,
        NO_DATA,
        NO_DATA,
        Phase.ACTIVATING,
        "no-timeout-below-min-scale",
        min_scale=1,
    ),
]


@pytest.mark.parametrize(
    ("before", "elapsed_s", "kpa_decision", "settings", "decision", "after"), CASES
)
def test_apply_scale_to_zero(
    before: Phase,
    elapsed_s: float,
    kpa_decision: Decision,
    settings: dict[str, Any],
    decision: Decision,
    after: Phase,
) -> None:
    knobs: dict[str, Any] = {**SHORT, **settings}
    actual, activation = apply_scale_to_zero(
        ScalingSettings(**knobs),
        ActivationState(before, 1000 - elapsed_s),
        kpa_decision=kpa_decision,
        last_desired=LAST_DESIRED,
        now=1000,
    )
    assert (actual, activation.phase) == (decision, after)
    assert activation.since == (1000 - elapsed_s if after is before else 1000)
