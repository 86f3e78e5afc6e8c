"""Deadlines that nest, by name."""

import pytest

from faasmoe_router.config import RouterConfig
from faasmoe_router.errors import RouterConfigError

REQUIRED = {"FAASMOE_STORE": "/store", "FAASMOE_TABLE": "/table.json"}
NAMES = ("CONNECT", "CALL", "LAYER", "REQUEST")


def read(*seconds: str) -> RouterConfig:
    given = {f"FAASMOE_{n}_TIMEOUT": s for n, s in zip(NAMES, seconds, strict=True)}
    return RouterConfig.from_env({**REQUIRED, **given})


def test_each_deadline_is_read() -> None:
    config = read("0.5", "2", "3", "60")
    found = [getattr(config, f"{name.lower()}_timeout_s") for name in NAMES]
    assert found == [0.5, 2.0, 3.0, 60.0]


@pytest.mark.parametrize(
    ("seconds", "name"),
    [
        (("3", "2", "4", "5"), "CONNECT"),
        (("1", "9", "4", "50"), "CALL"),
        (("1", "2", "51", "50"), "LAYER"),
        (("0", "2", "4", "50"), "CONNECT"),
        (("1", "2", "4", "never"), "REQUEST"),
    ],
)
def test_one_that_does_not_fit_into_the_next_is_named(seconds: tuple[str, ...], name: str) -> None:
    with pytest.raises(RouterConfigError, match=f"^FAASMOE_{name}_TIMEOUT: got "):
        read(*seconds)
