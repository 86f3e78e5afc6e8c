"""Settings of the gateway."""

import pytest

from faasmoe_gateway.config import GatewayConfig, GatewayConfigError

REQUIRED = {"FAASMOE_ROUTER_SOCKET": "/run/router.sock", "FAASMOE_FRONT_TOKEN": "secret"}


def test_defaults() -> None:
    config = GatewayConfig.from_env(REQUIRED)
    assert (config.host, config.port, config.keep_alive_s) == ("127.0.0.1", 8000, 75.0)
    assert config.listen_fd is None


@pytest.mark.parametrize("missing", sorted(REQUIRED))
def test_missing_setting_is_named(missing: str) -> None:
    env = {name: value for name, value in REQUIRED.items() if name != missing}
    with pytest.raises(GatewayConfigError, match=f"{missing}: not set"):
        GatewayConfig.from_env(env)


@pytest.mark.parametrize("name", ["PORT", "KEEP_ALIVE", "MAX_CONNECTIONS", "HOLD_TIMEOUT"])
def test_invalid_setting_is_named(name: str) -> None:
    with pytest.raises(GatewayConfigError, match=f"FAASMOE_{name}: got 'x', expected"):
        GatewayConfig.from_env({**REQUIRED, f"FAASMOE_{name}": "x"})
