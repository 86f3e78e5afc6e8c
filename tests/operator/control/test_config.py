from pathlib import Path

import pytest

from faasmoe_operator.control.config import ControlConfig
from faasmoe_operator.env_settings import OperatorConfigError

ENV = {
    "FAASMOE_MODEL_FILE": "/models/model.yaml",
    "FAASMOE_ZYGOTE_SOCKET": "/run/zygote.sock",
    "FAASMOE_TOKEN": "secret",
    "FAASMOE_FUNCTION_KEY": "ab" * 32,
}


def test_reads_the_environment() -> None:
    config = ControlConfig.from_env({**ENV, "FAASMOE_CONTROL_PORT": "8123"})
    assert config.model_file == Path("/models/model.yaml")
    assert (config.control_host, config.control_port) == ("127.0.0.1", 8123)
    assert config.function_key == b"\xab" * 32


def test_secrets_are_not_in_the_repr() -> None:
    shown = repr(ControlConfig.from_env(ENV))
    assert "secret" not in shown
    assert "xab" not in shown


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MODEL_FILE", "", "not set, expected the path of a MoEModel file"),
        ("ZYGOTE_SOCKET", "", "not set, expected the path of a socket"),
        ("TOKEN", "", "not set, expected a token"),
        ("FUNCTION_KEY", "xy", "expected 32 hexadecimal digits or more"),
        ("FUNCTION_KEY", "abcd", "expected 32 hexadecimal digits or more"),
        ("CONTROL_PORT", "0", "got '0', expected an integer from 1 to 65535"),
        ("CONTROL_PORT", "http", "got 'http', expected an integer from 1 to 65535"),
    ],
)
def test_an_invalid_value_is_reported_with_its_variable(
    name: str, value: str, message: str
) -> None:
    with pytest.raises(OperatorConfigError, match=f"FAASMOE_{name}: {message}"):
        ControlConfig.from_env({**ENV, f"FAASMOE_{name}": value})
