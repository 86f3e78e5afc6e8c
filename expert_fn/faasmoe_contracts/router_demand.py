"""What gateways and whoever starts and stops the routers of one machine tell each other.

Each gateway connects to a Unix socket of the launcher. Both write JSON lines: the gateway which
requests of each model are waiting or running (`RouterDemand`), every `REPORT_INTERVAL_S` and at
once when a model gets its first request, so that a router that was stopped for want of requests is
started; the launcher which routers take requests (`RunningRouters`), whenever that changes.

A router that is to end is left out first. It ends once every gateway has said that it knows, and
that it has no request of it any more.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Self

from faasmoe_contracts.json_reader import ObjectReader, parse_json

REPORT_INTERVAL_S = 1.0
MAX_LINE_BYTES = 1 << 20
MAX_ROUTERS = 1 << 16
_NAME = re.compile(r"[^\n]{1,512}")


@dataclass(slots=True)
class RouterDemand:
    """The requests of one gateway.

    Attributes:
        models: requests that are waiting or running, by model; models without any may be missing.
        routers: of these, those that were sent to each router, by model and router.
        seen: version of the running routers that it knows; 0 for none.
    """

    models: dict[str, int] = field(default_factory=dict)
    routers: dict[str, dict[str, int]] = field(default_factory=dict)
    seen: int = 0

    def dumps(self) -> bytes:
        """Return the line."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def loads(cls, line: bytes) -> Self:
        """Read a line; raises ContractError."""
        value = parse_json(line, field="demand")
        known = ("models", "routers", "seen")
        reader = ObjectReader(value, field="demand", known=known)
        routers = reader.mapping("routers", max_length=MAX_ROUTERS)
        return cls(
            _counts(reader.get("models"), path="models"),
            {model: _counts(found, path=f"routers.{model}") for model, found in routers.items()},
            reader.count("seen"),
        )


@dataclass(frozen=True, slots=True)
class RunningRouters:
    """The routers that take requests.

    Attributes:
        version: ascending number of the list.
        routers: names of the routers by model; none of a model for which requests wait.
    """

    version: int
    routers: Mapping[str, tuple[str, ...]]

    def dumps(self) -> bytes:
        """Return the line."""
        routers = {model: list(names) for model, names in self.routers.items()}
        return json.dumps({"version": self.version, "routers": routers}).encode() + b"\n"

    @classmethod
    def loads(cls, line: bytes) -> Self:
        """Read a line; raises ContractError."""
        value = parse_json(line, field="routers")
        reader = ObjectReader(value, field="routers", known=("version", "routers"))
        by_model = ObjectReader(reader.get("routers"), field="routers", path="routers")
        names = {}
        for model in reader.mapping("routers", max_length=MAX_ROUTERS):
            found = by_model.array(model, max_length=MAX_ROUTERS)
            if not all(isinstance(name, str) and _NAME.fullmatch(name) for name in found):
                raise by_model.error(model, "a list of names")
            names[model] = tuple(map(str, found))
        return cls(reader.count("version"), names)


@dataclass(frozen=True, slots=True)
class RouterReport:
    """The state of one router, by which the control process says whether it may run.

    Attributes:
        name: its name, unique on the machine.
        size_bytes: memory that it has, or will have.
        idle_s: seconds since it last had a request, or one waited for it.
        is_running: whether it has a process.
        is_wanted: whether it should run.
        is_pinned: whether it runs whatever the limit says.
        is_ready: whether it answers, and is not ending.
        waiting_s: seconds that requests of its model have waited for a router; 0 for none.
    """

    name: str
    size_bytes: int
    idle_s: float
    is_running: bool
    is_wanted: bool
    is_pinned: bool
    is_ready: bool
    waiting_s: float

    @classmethod
    def list_from_json(cls, value: object) -> list[Self]:
        """Read the state of all routers of a machine; raises ContractError."""
        reader = ObjectReader(value, known=("routers",))
        routers = reader.array("routers", max_length=MAX_ROUTERS)
        return [cls._from_json(r, path=f"routers.{i}") for i, r in enumerate(routers)]

    @classmethod
    def _from_json(cls, value: object, *, path: str) -> Self:
        known = [entry.name for entry in fields(cls)]
        reader = ObjectReader(value, field=path, path=path, known=known)
        return cls(
            reader.text("name", pattern=_NAME, expected="a text of one line"),
            reader.count("size_bytes"),
            reader.number("idle_s"),
            reader.flag("is_running", default=False),
            reader.flag("is_wanted", default=False),
            reader.flag("is_pinned", default=False),
            reader.flag("is_ready", default=False),
            reader.number("waiting_s"),
        )


def dump_router_reports(reports: Iterable[RouterReport]) -> dict[str, object]:
    """Return the body of POST /routers."""
    return {"routers": [asdict(report) for report in reports]}


def _counts(value: object, *, path: str) -> dict[str, int]:
    reader = ObjectReader(value, field=path, path=path)
    assert isinstance(value, Mapping)
    return {name: reader.count(name) for name in value}
