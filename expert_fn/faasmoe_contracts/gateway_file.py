"""The gateway's file: the models behind it and the tenants that may use them.

The launcher or the operator writes it, the gateway reads it. It contains no key: tenants' keys are
files of a folder, or on Kubernetes digests of them.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field, fields
from typing import Self

from faasmoe_contracts.json_reader import ContractError, ObjectReader, parse_json
from faasmoe_contracts.socket_address import split_host_port

VERSION = 1
MAX_MODELS = 1024
MAX_ROUTERS = 1024
MAX_TENANT_ENTRIES = 1024
_TEXT = re.compile(r"[^\n]{1,4096}")
_OPTIONAL_TEXT = re.compile(r"[^\n]{0,4096}")
_DIGEST = re.compile("[0-9a-f]{64}")
_UNITS = re.compile("inputTokens|outputTokens|money")
_PERIODS = re.compile("day|month")
_CURRENCY = re.compile("[A-Z]{3}")


@dataclass(frozen=True, slots=True)
class RouterEntry:
    """A router of a model.

    Attributes:
        name: its name among the model's routers.
        address: where it listens: a Unix socket, or HOST:PORT.
    """

    name: str
    address: str

    @classmethod
    def from_json(cls, value: object, *, path: str) -> Self:
        """Read an entry; raises ContractError."""
        reader = ObjectReader(value, field=path, path=path, known=("name", "address"))
        entry = cls(_text(reader, "name"), _text(reader, "address"))
        try:
            split_host_port(entry.address)
        except ContractError as error:
            raise reader.error("address", error.expected) from error
        return entry


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """A model.

    Attributes:
        name: name of the MoEModel.
        served_name: its name in requests.
        max_model_len: tokens of a prompt and its completion.
        routers: its routers.
        front_token: what to show them; None for the gateway's own.
        tls_name: name of their certificates, for TLS over TCP; None for none.
    """

    name: str
    served_name: str
    max_model_len: int
    routers: tuple[RouterEntry, ...]
    front_token: str | None = field(default=None, repr=False)
    tls_name: str | None = None

    @classmethod
    def from_json(cls, value: object, *, path: str) -> Self:
        """Read an entry; raises ContractError."""
        known = ("name", "served_name", "max_model_len", "routers", "front_token", "tls_name")
        reader = ObjectReader(value, field=path, path=path, known=known)
        routers = reader.array("routers", max_length=MAX_ROUTERS)
        return cls(
            _text(reader, "name"),
            _text(reader, "served_name"),
            reader.count("max_model_len"),
            tuple(
                RouterEntry.from_json(router, path=f"{path}.routers.{index}")
                for index, router in enumerate(routers)
            ),
            _optional_text(reader, "front_token"),
            _optional_text(reader, "tls_name"),
        )


@dataclass(frozen=True, slots=True)
class TenantModelEntry:
    """A model that a tenant may use.

    Attributes:
        name: name of the MoEModel.
        alias: an additional name in this tenant's requests; None for none.
        max_output_tokens: tokens of a completion; None for the model's.
    """

    name: str
    alias: str | None = None
    max_output_tokens: int | None = None

    @classmethod
    def from_json(cls, value: object, *, path: str) -> Self:
        """Read an entry; raises ContractError."""
        known = ("name", "alias", "max_output_tokens")
        reader = ObjectReader(value, field=path, path=path, known=known)
        return cls(
            _text(reader, "name"),
            _optional_text(reader, "alias"),
            _optional_count(reader, "max_output_tokens"),
        )


@dataclass(frozen=True, slots=True)
class LimitsEntry:
    """Limits of a tenant per minute, over all models; None for no limit."""

    requests: int | None = None
    tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None

    @classmethod
    def from_json(cls, value: object, *, path: str) -> Self:
        """Read an entry; raises ContractError."""
        known = ("requests", "tokens", "input_tokens", "output_tokens")
        reader = ObjectReader(value, field=path, path=path, known=known)
        return cls(*(_optional_count(reader, name) for name in known))


@dataclass(frozen=True, slots=True)
class BudgetEntry:
    """A budget: what may be used of a unit in each period, and when to warn, in percent."""

    unit: str
    period: str
    limit: float
    soft_percent: int

    @classmethod
    def from_json(cls, value: object, *, path: str) -> Self:
        """Read an entry; raises ContractError."""
        known = ("unit", "period", "limit", "soft_percent")
        reader = ObjectReader(value, field=path, path=path, known=known)
        return cls(
            reader.text("unit", pattern=_UNITS, expected="inputTokens, outputTokens or money"),
            reader.text("period", pattern=_PERIODS, expected="day or month"),
            reader.number("limit"),
            reader.count("soft_percent", maximum=100),
        )


@dataclass(frozen=True, slots=True)
class PricesEntry:
    """Prices per million tokens, in a currency of ISO 4217."""

    currency: str
    input_per_million: float
    output_per_million: float

    @classmethod
    def from_json(cls, value: object, *, path: str) -> Self:
        """Read an entry; raises ContractError."""
        known = ("currency", "input_per_million", "output_per_million")
        reader = ObjectReader(value, field=path, path=path, known=known)
        return cls(
            reader.text("currency", pattern=_CURRENCY, expected="three capital letters"),
            reader.number("input_per_million"),
            reader.number("output_per_million"),
        )


@dataclass(frozen=True, slots=True)
class TenantEntry:
    """A tenant.

    Attributes:
        name: its name, the first segment of its URL.
        keys_path: folder whose files are its API keys; empty if `key_digests` has them.
        models: the models that it may use.
        key_expiry: when keys end to be accepted, by file name, in seconds since the epoch.
        limits: its limits.
        budgets: its budgets.
        prices: what its tokens cost; None for nothing.
        host: host name that only its requests may have; None for none.
        key_digests: SHA-256 digests of its API keys by name, in hexadecimal.
    """

    name: str
    keys_path: str
    models: tuple[TenantModelEntry, ...]
    key_expiry: dict[str, float] = field(default_factory=dict)
    limits: LimitsEntry = field(default_factory=LimitsEntry)
    budgets: tuple[BudgetEntry, ...] = ()
    prices: PricesEntry | None = None
    host: str | None = None
    key_digests: dict[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def from_json(cls, value: object, *, path: str) -> Self:
        """Read an entry; raises ContractError."""
        known = [entry.name for entry in fields(cls)]
        reader = ObjectReader(value, field=path, path=path, known=known)
        models, budgets = reader.array("models"), reader.array("budgets")
        expiry = ObjectReader(reader.get("key_expiry"), path=f"{path}.key_expiry")
        names = reader.mapping("key_expiry", max_length=MAX_TENANT_ENTRIES)
        prices = reader.get("prices")
        digests = ObjectReader(reader.get("key_digests"), path=f"{path}.key_digests")
        digest_names = reader.mapping("key_digests", max_length=MAX_TENANT_ENTRIES)
        return cls(
            _text(reader, "name"),
            reader.text("keys_path", pattern=_OPTIONAL_TEXT, expected="a text of one line"),
            tuple(
                TenantModelEntry.from_json(model, path=f"{path}.models.{index}")
                for index, model in enumerate(models)
            ),
            {name: expiry.number(name) for name in names},
            LimitsEntry.from_json(reader.get("limits"), path=f"{path}.limits"),
            tuple(
                BudgetEntry.from_json(budget, path=f"{path}.budgets.{index}")
                for index, budget in enumerate(budgets)
            ),
            None if prices is None else PricesEntry.from_json(prices, path=f"{path}.prices"),
            _optional_text(reader, "host"),
            {n: digests.text(n, pattern=_DIGEST, expected="a digest") for n in digest_names},
        )


@dataclass(frozen=True, slots=True)
class GatewayFile:
    """The whole file.

    Attributes:
        models: the models, by ascending name.
        tenants: the tenants; if there are none, everyone may use every model.
        is_closed: whether nobody may call without a key, even while there are no tenants.
    """

    models: tuple[ModelEntry, ...]
    tenants: tuple[TenantEntry, ...]
    is_closed: bool = False

    def dumps(self, *, indent: int | None = 1) -> bytes:
        """Return the content of the file; one line with `indent` None."""
        value = asdict(self, dict_factory=_without_absent_names)
        return json.dumps({"version": VERSION, **value}, indent=indent).encode()

    @classmethod
    def loads(cls, content: bytes) -> Self:
        """Read the content; raises ContractError."""
        value = parse_json(content, field="gateway file")
        known = ("version", "models", "tenants", "is_closed")
        reader = ObjectReader(value, field="gateway file", known=known)
        if reader.count("version") != VERSION:
            raise reader.error("version", str(VERSION))
        models = reader.array("models", max_length=MAX_MODELS)
        tenants = reader.array("tenants", max_length=MAX_TENANT_ENTRIES)
        return cls(
            tuple(
                ModelEntry.from_json(model, path=f"models.{index}")
                for index, model in enumerate(models)
            ),
            tuple(
                TenantEntry.from_json(tenant, path=f"tenants.{index}")
                for index, tenant in enumerate(tenants)
            ),
            reader.flag("is_closed", default=False),
        )


def _without_absent_names(items: list[tuple[str, object]]) -> dict[str, object]:
    """Return an entry without what gateways of earlier versions would refuse."""
    return {name: value for name, value in items if (name, value) != ("tls_name", None)}


def _text(reader: ObjectReader, name: str) -> str:
    return reader.text(name, pattern=_TEXT, expected="a text of one line")


def _optional_text(reader: ObjectReader, name: str) -> str | None:
    return None if reader.get(name) is None else _text(reader, name)


def _optional_count(reader: ObjectReader, name: str) -> int | None:
    return None if reader.get(name) is None else reader.count(name)
