"""The control process's settings, read once from its environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from faasmoe_operator.errors import FaasmoeError

PREFIX = "FAASMOE_"
MIN_KEY_BYTES = 16
DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = "8090"


class OperatorConfigError(FaasmoeError):
    """A setting that cannot be used; the message names the variable."""


@dataclass(frozen=True, slots=True)
class ControlConfig:
    """What a control process is started with; each field is the variable FAASMOE_FIELD.

    Attributes:
        model_file: the MoEModel file; its store must be prepared.
        zygote_socket: the unix socket of the zygote that sandboxes are forked from.
        token: bearer token of this control's API and of the sandboxes.
        function_key: secret of the function ids (hexadecimal), the same at every restart.
        control_host: address to listen on.
        control_port: port to listen on.
    """

    model_file: Path
    zygote_socket: Path
    token: str = field(repr=False)
    function_key: bytes = field(repr=False)
    control_host: str
    control_port: int

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> ControlConfig:
        """Read the settings; raises ConfigError that names the variable."""
        return cls(
            model_file=Path(_required(env, "MODEL_FILE", "the path of a MoEModel file")),
            zygote_socket=Path(_required(env, "ZYGOTE_SOCKET", "the path of a socket")),
            token=_required(env, "TOKEN", "a token"),
            function_key=_key(_required(env, "FUNCTION_KEY", "hexadecimal digits")),
            control_host=env.get(f"{PREFIX}CONTROL_HOST") or DEFAULT_HOST,
            control_port=_port(env.get(f"{PREFIX}CONTROL_PORT") or DEFAULT_PORT),
        )


def _required(env: Mapping[str, str], name: str, expected: str) -> str:
    value = env.get(PREFIX + name, "")
    if not value:
        raise OperatorConfigError(f"{PREFIX}{name}: not set, expected {expected}")
    return value


def _key(text: str) -> bytes:
    expected = f"{PREFIX}FUNCTION_KEY: expected {2 * MIN_KEY_BYTES} hexadecimal digits or more"
    try:
        key = bytes.fromhex(text)
    except ValueError:
        raise OperatorConfigError(expected) from None
    if len(key) < MIN_KEY_BYTES:
        raise OperatorConfigError(expected)
    return key


def _port(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise OperatorConfigError(f"{PREFIX}CONTROL_PORT: got {text!r}, expected 1 to 65535")
    return int(text)
