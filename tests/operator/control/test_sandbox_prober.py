import pytest

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_operator.control.sandbox_client import AttachedFunction
from faasmoe_operator.control.sandbox_prober import (
    ACTIVITY_WINDOW_S,
    FunctionActivity,
    find_assignment_drift,
    find_listing_fault,
)

DIGEST = "sha256:0"
SPECS = {name: FunctionSpec(name, (0,), (index,)) for index, name in enumerate("abc")}


def attached_functions(*names: str) -> list[AttachedFunction]:
    return [AttachedFunction(SPECS.get(n, FunctionSpec(n, (9,), (9,))), DIGEST, 1) for n in names]


@pytest.mark.parametrize(
    ("functions", "fault"),
    [
        pytest.param(attached_functions(), None, id="nothing"),
        pytest.param(attached_functions("a", "b"), None, id="attached-functions"),
        pytest.param(attached_functions("x"), None, id="function-of-another-plan"),
        pytest.param(attached_functions("a", "b", "a"), "lists function a 2 times", id="twice"),
        pytest.param(
            [AttachedFunction(FunctionSpec("a", (0,), (7,)), DIGEST, 1)],
            "holds other experts as function a",
            id="other-experts",
        ),
        pytest.param(
            [AttachedFunction(SPECS["a"], "sha256:1", 1)],
            "holds other experts as function a",
            id="other-model",
        ),
    ],
)
def test_finds_invalid_listings(functions: list[AttachedFunction], fault: str | None) -> None:
    found = find_listing_fault(functions, SPECS, model_digest=DIGEST)
    assert found == fault or (fault is not None and found is not None and fault in found)


@pytest.mark.parametrize(
    ("functions", "expected", "possible", "fault"),
    [
        pytest.param("ab", "ab", "ab", None, id="agrees"),
        pytest.param("a", "a", "abc", None, id="attaching-or-detaching"),
        pytest.param("abc", "a", "abc", None, id="attached-meanwhile"),
        pytest.param("a", "ab", "ab", "no longer holds b (1 functions are missing)", id="lost"),
        pytest.param("abx", "ab", "ab", "holds x, which was never attached", id="foreign"),
    ],
)
def test_finds_assignment_drift(
    functions: str, expected: str, possible: str, fault: str | None
) -> None:
    found = find_assignment_drift(
        attached_functions(*functions), expected=set(expected), possible=set(possible)
    )
    assert found == fault or (fault is not None and found is not None and fault in found)


def test_growing_frame_counts_are_activity() -> None:
    activity = FunctionActivity()
    activity.record_frame_counts("s1", [("f0", 7), ("f1", 7)], now=0.0)
    assert activity.recently_active(0.0) == set()  # the frames may be old
    activity.record_frame_counts("s1", [("f0", 8), ("f1", 7)], now=5.0)
    assert activity.recently_active(5.0) == {"f0"}
    assert activity.recently_active(5.0 + ACTIVITY_WINDOW_S + 1) == set()
    activity.retain_sandboxes([])
    activity.record_frame_counts("s1", [("f0", 99)], now=30.0)
    assert activity.recently_active(30.0) == set()
