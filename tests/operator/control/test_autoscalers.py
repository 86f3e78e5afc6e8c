"""The autoscalers of several functions, driven by a fake clock."""

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_operator.control.autoscalers import FunctionAutoscalers, ObservedReplicas
from faasmoe_operator.control.functions import ManagedFunction
from faasmoe_operator.scaling import Phase, Reason, ScalingSettings

SETTINGS = ScalingSettings(
    initial_scale=0, max_scale=8, target=4, window_s=6, panic_window_percentage=20,
    scale_to_zero_grace_period_s=2,
)  # fmt: skip


def functions(**settings: ScalingSettings) -> list[ManagedFunction]:
    return [
        ManagedFunction(FunctionSpec(name, (0,), (index,)), 1, scaling)
        for index, (name, scaling) in enumerate(settings.items())
    ]


def test_new_deployment_starts_at_the_initial_scale() -> None:
    eager = ScalingSettings(initial_scale=2)
    autoscalers = FunctionAutoscalers(functions(lazy=SETTINGS, eager=eager), observed=None, now=0.0)
    assert (autoscalers.desired("lazy"), autoscalers.desired("eager")) == (0, 2)


def test_adopted_functions_keep_their_replicas() -> None:
    observed = {"used": ObservedReplicas(assigned=2, ready=2)}
    eager = ScalingSettings(initial_scale=2)
    autoscalers = FunctionAutoscalers(
        functions(used=SETTINGS, eager=eager), observed=observed, now=0.0
    )
    assert (autoscalers.desired("used"), autoscalers.desired("eager")) == (2, 0)
    assert autoscalers.phase("used") is Phase.ACTIVE


def test_activation_scales_each_function_at_zero_up_once() -> None:
    autoscalers = FunctionAutoscalers(functions(a=SETTINGS, b=SETTINGS), observed=None, now=0.0)
    changes = autoscalers.activate(["a", "a"], now=1.0)
    assert [(c.function, c.previous, c.decision.desired) for c in changes] == [("a", 0, 1)]
    assert changes[0].decision.reason is Reason.ACTIVATED
    assert autoscalers.activate(["a"], now=1.1) == []
    assert (autoscalers.desired("a"), autoscalers.desired("b")) == (1, 0)


def test_scales_up_under_load_and_back_to_zero() -> None:
    autoscalers = FunctionAutoscalers(functions(f=SETTINGS), observed=None, now=0.0)
    autoscalers.activate(["f"], now=100.0)
    desired = []
    for second in range(30):
        now = 101.0 + second
        autoscalers.observe({"f": 11.0} if second < 5 else {}, now=now)
        autoscalers.decide({"f": autoscalers.desired("f")}, now=now)
        desired.append(autoscalers.desired("f"))
    assert max(desired) == 4  # 11 calls; a replica takes 4 * 70 %
    assert desired[0] == 4
    assert desired[-1] == 0
    assert autoscalers.phase("f") is Phase.INACTIVE


def test_keeps_replicas_while_load_is_unknown() -> None:
    autoscalers = FunctionAutoscalers(
        functions(f=SETTINGS), observed={"f": ObservedReplicas(3, 3)}, now=0.0
    )
    for second in range(1, 60):
        autoscalers.observe(None, now=float(second))
        assert autoscalers.decide({"f": 3}, now=float(second)) == []
    assert autoscalers.concurrency("f", now=60.0) is None


def test_late_tick_does_not_scale_down_continuous_load() -> None:
    autoscalers = FunctionAutoscalers(
        functions(f=SETTINGS), observed={"f": ObservedReplicas(1, 1)}, now=0.0
    )
    desired = []
    for now in (1.5, 2.5, 3.5, 7.4, 7.5, 8.5, 12.5):
        if autoscalers.has_unobserved_seconds(now):
            autoscalers.backfill({"f": 11.0}, now=now)
        autoscalers.observe({"f": 11.0}, now=now)
        autoscalers.decide({"f": autoscalers.desired("f")}, now=now)
        desired.append(autoscalers.desired("f"))
        assert autoscalers.concurrency("f", now=now) == 11.0
    assert desired == [4] * 7


def test_backfill_without_known_load_records_nothing() -> None:
    autoscalers = FunctionAutoscalers(
        functions(f=SETTINGS), observed={"f": ObservedReplicas(1, 1)}, now=0.0
    )
    assert autoscalers.has_unobserved_seconds(3.0)
    autoscalers.backfill(None, now=3.0)
    assert not autoscalers.has_unobserved_seconds(3.0)
    assert autoscalers.concurrency("f", now=3.0) is None


def test_backfill_is_limited_to_the_stable_window() -> None:
    autoscalers = FunctionAutoscalers(
        functions(f=SETTINGS), observed={"f": ObservedReplicas(1, 1)}, now=0.0
    )
    autoscalers.backfill({"f": 11.0}, now=1e9)
    assert autoscalers.concurrency("f", now=1e9) == 11.0


def test_decide_returns_only_changes() -> None:
    autoscalers = FunctionAutoscalers(
        functions(f=SETTINGS), observed={"f": ObservedReplicas(1, 1)}, now=0.0
    )
    autoscalers.observe({"f": 11.0}, now=1.0)
    changes = autoscalers.decide({"f": 1}, now=1.0)
    assert [(c.function, c.previous, c.decision.desired) for c in changes] == [("f", 1, 4)]
    autoscalers.observe({"f": 11.0}, now=2.0)
    assert autoscalers.decide({"f": 4}, now=2.0) == []
    assert autoscalers.concurrency("f", now=2.0) == 11.0
