"""All functions' autoscalers together, with a clock that is moved."""

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
        ManagedFunction(FunctionSpec(name, (0,), (index,)), 1, given)
        for index, (name, given) in enumerate(settings.items())
    ]


def test_functions_of_a_new_deployment_start_at_their_initial_scale() -> None:
    eager = ScalingSettings(initial_scale=2)
    scalers = FunctionAutoscalers(functions(lazy=SETTINGS, eager=eager), observed=None, now=0.0)
    assert (scalers.desired("lazy"), scalers.desired("eager")) == (0, 2)


def test_functions_that_were_found_keep_their_replicas() -> None:
    found = {"used": ObservedReplicas(assigned=2, ready=2)}
    eager = ScalingSettings(initial_scale=2)
    scalers = FunctionAutoscalers(functions(used=SETTINGS, eager=eager), observed=found, now=0.0)
    assert (scalers.desired("used"), scalers.desired("eager")) == (2, 0)
    assert scalers.phase("used") is Phase.ACTIVE


def test_a_wake_brings_up_those_at_zero_and_each_once() -> None:
    scalers = FunctionAutoscalers(functions(a=SETTINGS, b=SETTINGS), observed=None, now=0.0)
    changes = scalers.activate(["a", "a"], now=1.0)
    assert [(c.function, c.previous, c.decision.desired) for c in changes] == [("a", 0, 1)]
    assert changes[0].decision.reason is Reason.ACTIVATED
    assert scalers.activate(["a"], now=1.1) == []
    assert (scalers.desired("a"), scalers.desired("b")) == (1, 0)


def test_a_day_in_the_life_of_a_function() -> None:
    scalers = FunctionAutoscalers(functions(f=SETTINGS), observed=None, now=0.0)
    scalers.activate(["f"], now=100.0)
    desired = []
    for second in range(30):
        now = 101.0 + second
        scalers.observe({"f": 11.0} if second < 5 else {}, now=now)
        scalers.decide({"f": scalers.desired("f")}, now=now)
        desired.append(scalers.desired("f"))
    assert max(desired) == 4  # 11 calls, 4 * 70% in one replica
    assert desired[0] == 4
    assert desired[-1] == 0
    assert scalers.phase("f") is Phase.INACTIVE


def test_silence_keeps_replicas() -> None:
    scalers = FunctionAutoscalers(
        functions(f=SETTINGS), observed={"f": ObservedReplicas(3, 3)}, now=0.0
    )
    for second in range(1, 60):
        scalers.observe(None, now=float(second))
        assert scalers.decide({"f": 3}, now=float(second)) == []
    assert scalers.concurrency("f", now=60.0) is None


def test_a_late_tick_takes_no_replica_from_a_load_that_goes_on() -> None:
    scalers = FunctionAutoscalers(
        functions(f=SETTINGS), observed={"f": ObservedReplicas(1, 1)}, now=0.0
    )
    desired = []
    for now in (1.5, 2.5, 3.5, 7.4, 7.5, 8.5, 12.5):  # one of these after the other is due
        if scalers.has_unobserved_seconds(now):
            scalers.backfill({"f": 11.0}, now=now)
        scalers.observe({"f": 11.0}, now=now)
        scalers.decide({"f": scalers.desired("f")}, now=now)
        desired.append(scalers.desired("f"))
        assert scalers.concurrency("f", now=now) == 11.0
    assert desired == [4] * 7


def test_seconds_that_nobody_can_tell_of_are_left_out() -> None:
    scalers = FunctionAutoscalers(
        functions(f=SETTINGS), observed={"f": ObservedReplicas(1, 1)}, now=0.0
    )
    assert scalers.has_unobserved_seconds(3.0)
    scalers.backfill(None, now=3.0)
    assert not scalers.has_unobserved_seconds(3.0)
    assert scalers.concurrency("f", now=3.0) is None


def test_the_load_of_a_long_stop_is_only_looked_at_as_far_as_the_window_goes() -> None:
    scalers = FunctionAutoscalers(
        functions(f=SETTINGS), observed={"f": ObservedReplicas(1, 1)}, now=0.0
    )
    scalers.backfill({"f": 11.0}, now=1e9)
    assert scalers.concurrency("f", now=1e9) == 11.0


def test_tells_only_what_changed() -> None:
    scalers = FunctionAutoscalers(
        functions(f=SETTINGS), observed={"f": ObservedReplicas(1, 1)}, now=0.0
    )
    scalers.observe({"f": 11.0}, now=1.0)
    changes = scalers.decide({"f": 1}, now=1.0)
    assert [(c.function, c.previous, c.decision.desired) for c in changes] == [("f", 1, 4)]
    scalers.observe({"f": 11.0}, now=2.0)
    assert scalers.decide({"f": 4}, now=2.0) == []
    assert scalers.concurrency("f", now=2.0) == 11.0
