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


OPERATED = {
    "FAASMOE_GATEWAY_FILE": "/etc/gateway.json",
    "FAASMOE_CONTROL_ADDRESS": "operator.svc:8092",
    "FAASMOE_CONTROL_TOKEN_FILE": "/etc/token",
    "FAASMOE_NAME": "gateway-x",
}


def test_behind_an_operator_each_model_has_a_token_and_metrics_are_where_the_api_is() -> None:
    config = GatewayConfig.from_env({**OPERATED, "FAASMOE_HOST": "0.0.0.0"})
    assert (config.control_address, config.name) == ("operator.svc:8092", "gateway-x")
    assert (config.front_token, config.gateway_metrics_host) == ("", "0.0.0.0")
    alone = GatewayConfig.from_env({**REQUIRED, "FAASMOE_HOST": "0.0.0.0"})
    assert alone.gateway_metrics_host == "127.0.0.1"


@pytest.mark.parametrize("missing", sorted(OPERATED.keys() - {"FAASMOE_CONTROL_ADDRESS"}))
def test_what_an_operator_needs_is_named(missing: str) -> None:
    env = {name: value for name, value in OPERATED.items() if name != missing}
    expected = "FAASMOE_ROUTER_SOCKET" if missing == "FAASMOE_GATEWAY_FILE" else missing
    with pytest.raises(GatewayConfigError, match=f"{expected}: not set"):
        GatewayConfig.from_env(env)


@pytest.mark.parametrize("address", ["x", "/run/socket", "host:", ":80", "host:99999"])
def test_address_of_the_operator_is_checked(address: str) -> None:
    with pytest.raises(GatewayConfigError, match=f"got '{address}', expected HOST:PORT"):
        GatewayConfig.from_env({**OPERATED, "FAASMOE_CONTROL_ADDRESS": address})


def test_metrics_need_a_gateway_file() -> None:
    with pytest.raises(GatewayConfigError, match="GATEWAY_METRICS_PORT: got 9100, expected none"):
        GatewayConfig.from_env({**REQUIRED, "FAASMOE_GATEWAY_METRICS_PORT": "9100"})


def test_tls_needs_a_gateway_file() -> None:
    with pytest.raises(GatewayConfigError, match="TLS_FOLDER: got /tls, expected none"):
        GatewayConfig.from_env({**REQUIRED, "FAASMOE_TLS_FOLDER": "/tls"})
    config = GatewayConfig.from_env({**OPERATED, "FAASMOE_TLS_FOLDER": "/tls"})
    assert str(config.tls_folder) == "/tls"
