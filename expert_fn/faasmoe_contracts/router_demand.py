"""What a gateway tells whoever starts and stops the routers of one machine, and when.

The gateway connects to a Unix socket and writes one JSON line for each report: the requests of each
model that are waiting or running. It reports every `REPORT_INTERVAL_S`, and at once when a model
gets its first request, so that a router that was stopped for want of requests is started.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Self

from faasmoe_contracts.json_reader import ObjectReader, parse_json

REPORT_INTERVAL_S = 1.0
MAX_LINE_BYTES = 1 << 20


class RouterDemand(dict[str, int]):
    """Requests that are waiting or running, by model; models without any may be missing."""

    def dumps(self) -> bytes:
        """Return the line."""
        return json.dumps(self).encode() + b"\n"

    @classmethod
    def loads(cls, line: bytes) -> Self:
        """Read a line; raises ContractError."""
        value = parse_json(line, field="demand")
        reader = ObjectReader(value, field="demand")
        assert isinstance(value, Mapping)
        return cls({name: reader.count(name) for name in value})
