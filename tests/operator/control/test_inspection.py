import pytest

from faasmoe_expert.table import FunctionSpec
from faasmoe_operator.control.inspection import fault_of_content, fault_of_list
from faasmoe_operator.control.sandbox_client import AttachedFunction

DIGEST = "sha256:0"
SPECS = {name: FunctionSpec(name, (0,), (index,)) for index, name in enumerate("abc")}


def held(*names: str) -> list[AttachedFunction]:
    return [AttachedFunction(SPECS.get(n, FunctionSpec(n, (9,), (9,))), DIGEST, 1) for n in names]


@pytest.mark.parametrize(
    ("functions", "fault"),
    [
        pytest.param(held(), None, id="nothing"),
        pytest.param(held("a", "b"), None, id="what-was-attached"),
        pytest.param(held("x"), None, id="of-another-plan"),
        pytest.param(held("a", "b", "a"), "lists function a 2 times", id="twice"),
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
    found = fault_of_list(functions, SPECS, model_digest=DIGEST)
    assert found == fault or (fault is not None and found is not None and fault in found)


@pytest.mark.parametrize(
    ("functions", "expected", "possible", "fault"),
    [
        pytest.param("ab", "ab", "ab", None, id="agrees"),
        pytest.param("a", "a", "abc", None, id="some-come-or-go"),
        pytest.param("abc", "a", "abc", None, id="some-came"),
        pytest.param("a", "ab", "ab", "holds b no more (1 functions are missing)", id="lost"),
        pytest.param("abx", "ab", "ab", "holds x, which was never attached", id="foreign"),
    ],
)
def test_finds_content_that_differs(
    functions: str, expected: str, possible: str, fault: str | None
) -> None:
    found = fault_of_content(held(*functions), expected=set(expected), possible=set(possible))
    assert found == fault or (fault is not None and found is not None and fault in found)
