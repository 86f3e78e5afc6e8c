"""Base of the settings that processes of the control plane read from their environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import ClassVar, Self

from pydantic import ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from faasmoe_contracts.environment import describe_setting_error, read_variables
from faasmoe_operator.errors import FaasmoeError


class OperatorConfigError(FaasmoeError):
    """A setting is missing or invalid; the message names the variable."""


class EnvSettings(BaseSettings):
    """Settings of which each field is one environment variable: PREFIX and the field's name.

    Attributes:
        PREFIX: prefix of the variables.
    """

    PREFIX: ClassVar[str]
    model_config = SettingsConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> Self:
        """Read the settings; an empty variable counts as not set.

        Raises:
            OperatorConfigError: a setting is missing or invalid; the message names the variable.
        """
        try:
            return cls(**read_variables(cls.model_fields, env, prefix=cls.PREFIX))
        except ValidationError as error:
            detail = error.errors(include_url=False)[0]
            message = describe_setting_error(detail, cls.model_fields, prefix=cls.PREFIX)
            raise OperatorConfigError(message) from None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        *_: PydanticBaseSettingsSource,
        **__: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Use the constructor's arguments only: `from_env` reads the environment."""
        return (init_settings,)
