"""Nested timeouts: each must fit into the next longer one."""

import pytest

from faasmoe_router.config import RouterConfig
from faasmoe_router.errors import RouterConfigError

REQUIRED = {"FAASMOE_STORE": "/store", "FAASMOE_TABLE": "/table.json"}
NAMES = ("CONNECT", "CALL", "LAYER", "REQUEST")


def config_from_timeouts(*seconds: str) -> RouterConfig:
    timeouts = {f"FAASMOE_{n}_TIMEOUT": s for n, s in zip(NAMES, seconds, strict=True)}
    return RouterConfig.from_env({**REQUIRED, **timeouts})


def test_reads_every_timeout() -> None:
    config = config_from_timeouts("0.5", "2", "3", "60")
    timeouts = [getattr(config, f"{name.lower()}_timeout_s") for name in NAMES]
    assert timeouts == [0.5, 2.0, 3.0, 60.0]


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
def test_error_names_the_timeout_that_exceeds_the_next(seconds: tuple[str, ...], name: str) -> None:
    with pytest.raises(RouterConfigError, match=f"^FAASMOE_{name}_TIMEOUT: got "):
        config_from_timeouts(*seconds)
