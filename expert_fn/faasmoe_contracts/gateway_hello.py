"""The first line of a gateway's connection to the operator: who it is, and what it connects for.

A gateway has three connections over TCP, one for each purpose, each with the protocol that gateways
of one machine speak over a Unix socket:

- `config`: the operator writes the gateway's file (`gateway_file`) as one line, at each change;
- `leases`: tokens of the tenants' limits (`lease_messages`);
- `demand`: requests of each model, by which routers start and stop (`router_demand`).
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from typing import Self

from faasmoe_contracts.json_reader import ObjectReader, parse_json

PURPOSES = ("config", "leases", "demand")
MAX_HELLO_BYTES = 4096
_TEXT = re.compile(r"[!-~]{1,512}")


@dataclass(frozen=True, slots=True)
class GatewayHello:
    """The line.

    Attributes:
        token: the secret of all gateways.
        gateway: name of the gateway, the same after a restart: that of its pod.
        purpose: one of PURPOSES.
    """

    token: str = field(repr=False)
    gateway: str
    purpose: str

    def dumps(self) -> bytes:
        """Return the line."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def loads(cls, line: bytes) -> Self:
        """Read a line; raises ContractError, whose message may show the token."""
        known = ("token", "gateway", "purpose")
        reader = ObjectReader(parse_json(line, field="hello"), field="hello", known=known)
        return cls(
            reader.text("token", pattern=_TEXT, expected="a token"),
            reader.text("gateway", pattern=_TEXT, expected="a name"),
            reader.text(
                "purpose", pattern=re.compile("|".join(PURPOSES)), expected=", ".join(PURPOSES)
            ),
        )
