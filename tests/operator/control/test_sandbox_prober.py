import pytest

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_operator.control.sandbox_client import AttachedFunction
from faasmoe_operator.control.sandbox_prober import find_assignment_drift, find_listing_fault

DIGEST = "sha256:0"
SPECS = {name: FunctionSpec(name, (0,), (index,)) for index, name in enumerate("abc")}


def attached_functions(*names: str) -> list[AttachedFunction]:
    return [AttachedFunction(SPECS.get(n, FunctionSpec(n, (9,), (9,))), DIGEST, 1) for n in names]


@pytest.mark.parametrize(
    ("functions", "fault"),
    [
        pytest.param(attached_functions(), None, id="nothing"),
        pytest.param(attached_functions("a", "b"), None, id="what-was-attached"),
        pytest.param(attached_functions("x"), None, id="of-another-plan"),
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
def test_finds_lists_that_cannot_be_true(
    functions: list[AttachedFunction], fault: str | None
) -> None:
    found = find_listing_fault(functions, SPECS, model_digest=DIGEST)
    assert found == fault or (fault is not None and found is not None and fault in found)


@pytest.mark.parametrize(
    ("functions", "expected", "possible", "fault"),
    [
        pytest.param("ab", "ab", "ab", None, id="agrees"),
        pytest.param("a", "a", "abc", None, id="some-come-or-go"),
        pytest.param("abc", "a", "abc", None, id="some-came"),
        pytest.param("a", "ab", "ab", "no longer holds b (1 functions are missing)", id="lost"),
        pytest.param("abx", "ab", "ab", "holds x, which was never attached", id="foreign"),
    ],
)
def test_finds_content_that_differs(
    functions: str, expected: str, possible: str, fault: str | None
) -> None:
    found = find_assignment_drift(
        attached_functions(*functions), expected=set(expected), possible=set(possible)
    )
    assert found == fault or (fault is not None and found is not None and fault in found)
