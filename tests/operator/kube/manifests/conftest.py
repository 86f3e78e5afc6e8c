"""Cases of MoEModels and their objects."""

import pytest
from model_contexts import CASES, all_objects, make_context

from faasmoe_operator.kube.manifests import ModelContext
from faasmoe_operator.kube.types import Object


@pytest.fixture(params=CASES.values(), ids=list(CASES))
def any_context(request: pytest.FixtureRequest) -> ModelContext:
    """The context of each case."""
    return make_context(**request.param)


@pytest.fixture
def objects(any_context: ModelContext) -> list[Object]:
    """All objects of each case, including a sandbox."""
    return all_objects(any_context)


@pytest.fixture(scope="session")
def rendered() -> dict[str, list[Object]]:
    """All objects of all cases by name."""
    return {name: all_objects(make_context(**case)) for name, case in CASES.items()}
