"""Settings of the control process of `faasmoe up`, read from its environment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from faasmoe_contracts.environment import integer_between
from faasmoe_operator.env_settings import EnvSettings

MIN_KEY_BYTES = 16


def _parse_key(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        key = bytes.fromhex(value)
    except ValueError:
        key = b""
    if len(key) < MIN_KEY_BYTES:
        raise ValueError(f"{2 * MIN_KEY_BYTES} hexadecimal digits or more")
    return key


class MachineConfig(EnvSettings):
    """Settings of a control process of several models; each field is the variable FAASMOE_FIELD.

    Attributes:
        models_file: the models.
        token: bearer token of this process's API and of the sandboxes.
        control_host: address to listen on.
        control_port: port to listen on.
        page_socket: Unix socket on which the live page is served; None serves none.
        page_key: bearer token that the page's data require; empty for loopback alone.
        page_min_tokens: tokens that sums over single functions hold at least before they are shown.
        gateway_file: the tenants, whose limits are leased.
        lease_socket: Unix socket on which limits are leased; None leases none.
    """

    PREFIX: ClassVar[str] = "FAASMOE_"

    models_file: Path = Field(description="the path of a file of models")
    token: str = Field(repr=False, description="a token")
    control_host: str = "127.0.0.1"
    control_port: Annotated[int, BeforeValidator(integer_between(1, 65535))] = 8090
    page_socket: Path | None = Field(None, description="the path of a socket")
    page_key: str = Field("", repr=False, description="a token")
    page_min_tokens: Annotated[int, BeforeValidator(integer_between(1, 1 << 20))] = 256
    gateway_file: Path | None = Field(None, description="the path of a gateway's file")
    lease_socket: Path | None = Field(None, description="the path of a socket")


class ControlConfig(EnvSettings):
    """Settings of a control process; each field is the variable FAASMOE_FIELD.

    Attributes:
        model_file: the MoEModel file; its store must be prepared.
        zygote_socket: Unix socket of the zygote that forks sandboxes.
        token: bearer token of this process's API and of the sandboxes.
        function_key: secret from which function ids are derived, the same at every start; in the
            environment hexadecimal.
        control_host: address to listen on.
        control_port: port to listen on.
        page_socket: Unix socket on which the live page is served; None serves none.
        page_key: bearer token that the page's data require; empty for loopback alone.
        page_min_tokens: tokens that sums over single functions hold at least before they are shown.
    """

    PREFIX: ClassVar[str] = "FAASMOE_"

    model_file: Path = Field(description="the path of a MoEModel file")
    zygote_socket: Path = Field(description="the path of a socket")
    token: str = Field(repr=False, description="a token")
    function_key: Annotated[bytes, BeforeValidator(_parse_key)] = Field(
        repr=False, description="hexadecimal digits"
    )
    control_host: str = "127.0.0.1"
    control_port: Annotated[int, BeforeValidator(integer_between(1, 65535))] = 8090
    page_socket: Path | None = Field(None, description="the path of a socket")
    page_key: str = Field("", repr=False, description="a token")
    page_min_tokens: Annotated[int, BeforeValidator(integer_between(1, 1 << 20))] = 256
