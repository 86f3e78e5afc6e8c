"""The routing table: which expert function holds which experts, and at which addresses.

The control plane writes it and the router reads it; attaching a function sends one FunctionSpec to
a sandbox. Plain frozen values with strict JSON parsing; knows nothing of transport.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from faasmoe_contracts.text import short_repr


class RoutingTableError(ValueError):
    """Raised for an invalid routing table; the message names the field, got and expected values."""


@dataclass(frozen=True, slots=True)
class FunctionSpec:
    """One expert function: a block of experts in one or several MoE layers.

    Attributes:
        id: opaque id from `make_function_id`, which reveals no routing information; 1 to 64 ASCII
            letters and digits, because it is part of URLs.
        layers: MoE layer indices in the store's manifest, 0-based, ascending, at least one.
        experts: global expert indices in each of these layers, ascending, at least one.
    """

    id: str
    layers: tuple[int, ...]
    experts: tuple[int, ...]

    def __post_init__(self) -> None:
        """Validate all fields; raises RoutingTableError."""
        if not (self.id.isascii() and self.id.isalnum()) or len(self.id) > 64:
            raise RoutingTableError(
                f"id: got {short_repr(self.id)}, expected 1 to 64 ASCII letters and digits"
            )
        for field in ("layers", "experts"):
            values = getattr(self, field)
            if not values:
                raise RoutingTableError(f"{field}: got an empty list, expected at least one index")
            if any(not isinstance(v, int) or isinstance(v, bool) or v < 0 for v in values):
                raise RoutingTableError(
                    f"{field}: got {short_repr(list(values))}, expected indices of 0 or more"
                )
            if list(values) != sorted(set(values)):
                raise RoutingTableError(
                    f"{field}: got {short_repr(list(values))}, "
                    "expected ascending indices without duplicates"
                )

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of this spec."""
        return {"id": self.id, "layers": list(self.layers), "experts": list(self.experts)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> FunctionSpec:
        """Parse a spec from a JSON object; raises RoutingTableError naming the field."""
        return cls(
            id=_require_field(value, "id", str),
            layers=tuple(_require_field(value, "layers", list)),
            experts=tuple(_require_field(value, "experts", list)),
        )


@dataclass(frozen=True, slots=True)
class FunctionEndpoints:
    """A function and the sandboxes that serve it.

    Attributes:
        spec: the function.
        addresses: `host:port` of each ready sandbox; empty if there is none.
    """

    spec: FunctionSpec
    addresses: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of this entry: the spec's fields and `addresses`."""
        return {**self.spec.to_json(), "addresses": list(self.addresses)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> FunctionEndpoints:
        """Parse an entry from a JSON object; raises RoutingTableError naming the field."""
        addresses = tuple(_require_field(value, "addresses", list))
        for address in addresses:
            host, _, port = str(address).rpartition(":")
            is_number = port.isascii() and port.isdecimal() and len(port) <= 5
            if not host or not is_number or not 0 < int(port) < 65536:
                raise RoutingTableError(f"addresses: got {short_repr(address)}, expected host:port")
        return cls(FunctionSpec.from_json(value), addresses)


@dataclass(frozen=True, slots=True)
class RoutingTable:
    """All functions of one model at one version.

    Attributes:
        model_digest: digest of the store's manifest.
        version: starts at 0 and increases with every change.
        functions: one entry per function, in a fixed order.
    """

    model_digest: str
    version: int
    functions: tuple[FunctionEndpoints, ...]

    def __post_init__(self) -> None:
        """Raise RoutingTableError if two functions hold the same expert of a layer."""
        seen: dict[tuple[int, int], str] = {}
        for entry in self.functions:
            for layer in entry.spec.layers:
                for expert in entry.spec.experts:
                    other = seen.setdefault((layer, expert), entry.spec.id)
                    if other != entry.spec.id:
                        raise RoutingTableError(
                            f"functions: layer {layer} expert {expert} is in {other} and in "
                            f"{entry.spec.id}, expected one function for each expert"
                        )

    def uncovered_experts(self, *, n_layers: int, n_experts: int) -> list[tuple[int, int]]:
        """Return the (layer, expert) pairs of a model that no function holds."""
        specs = [entry.spec for entry in self.functions]
        covered = {(layer, e) for spec in specs for layer in spec.layers for e in spec.experts}
        all_pairs = ((layer, e) for layer in range(n_layers) for e in range(n_experts))
        return [pair for pair in all_pairs if pair not in covered]

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of the whole table."""
        return {
            "model_digest": self.model_digest,
            "version": self.version,
            "functions": [entry.to_json() for entry in self.functions],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RoutingTable:
        """Parse a table from a JSON object; raises RoutingTableError naming the field."""
        return cls(
            model_digest=_require_field(value, "model_digest", str),
            version=_require_field(value, "version", int),
            functions=tuple(
                FunctionEndpoints.from_json(f) for f in _require_field(value, "functions", list)
            ),
        )

    @classmethod
    def loads(cls, text: str | bytes) -> RoutingTable:
        """Parse a table from JSON text; raises RoutingTableError."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RoutingTableError(f"table: not JSON ({error})") from error
        if not isinstance(value, dict):
            raise RoutingTableError(f"table: got {type(value).__name__}, expected an object")
        return cls.from_json(value)


def make_function_id(
    key: bytes, *, model_digest: str, layers: Iterable[int], experts: Iterable[int]
) -> str:
    """Return the opaque id of a function, 24 hexadecimal digits of an HMAC-SHA-256.

    Ids appear on the wire: descriptive names would reveal the routing to whoever reads the traffic.
    """
    identity = json.dumps([model_digest, list(layers), list(experts)])
    return hmac.new(key, identity.encode(), hashlib.sha256).hexdigest()[:24]


def _require_field(value: Mapping[str, Any], name: str, expected_type: type) -> Any:
    if not isinstance(value, Mapping):
        raise RoutingTableError(f"function: got {type(value).__name__}, expected an object")
    if name not in value:
        raise RoutingTableError(f"{name}: missing")
    found = value[name]
    if not isinstance(found, expected_type) or (expected_type is int and isinstance(found, bool)):
        raise RoutingTableError(
            f"{name}: got {type(found).__name__}, expected {expected_type.__name__}"
        )
    return found
