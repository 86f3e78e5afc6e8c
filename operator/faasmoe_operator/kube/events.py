"""Events on changes of a model's state, for `kubectl describe` and `kubectl get events`.

Each is an object of its own name, made from what it says: said again, its count goes up.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from faasmoe_operator.kube.api import KubeApi
from faasmoe_operator.kube.conditions import ACTIVE, READY
from faasmoe_operator.kube.errors import ApiError
from faasmoe_operator.kube.kinds import EVENT, Object
from faasmoe_operator.kube.manifests.names import FIELD_MANAGER

logger = logging.getLogger(__name__)

MAX_NOTE_CHARS = 1024
MAX_KNOWN = 10_000


@dataclass(frozen=True, slots=True)
class StateEvent:
    """A change that is worth telling.

    Attributes:
        type: Warning if somebody may have to act.
        reason: CamelCase, machine-stable.
        note: for people.
    """

    type: Literal["Normal", "Warning"]
    reason: str
    note: str


def state_events(before: Iterable[Object], after: Iterable[Object]) -> list[StateEvent]:
    """Return what is worth telling: a part that became well, or is wrong in a new way. Pure.

    Whether functions are active changes with the traffic and is not told; what Ready says another
    condition has said already, but for the moment when all is well.
    """
    known = {condition.get("type"): condition for condition in before}
    found = []
    for condition in after:
        kind, status, reason = condition["type"], condition["status"], condition["reason"]
        last = known.get(kind, {})
        if kind == ACTIVE or (last.get("status"), last.get("reason")) == (status, reason):
            continue
        flipped = last.get("status") != status
        if status == "True" and flipped and last.get("status") is not None:
            found.append(StateEvent("Normal", reason, condition["message"]))
        elif status == "False" and (kind != READY or reason in ("SpecInvalid", "Suspended")):
            type_: Literal["Normal", "Warning"] = "Normal" if reason == "Suspended" else "Warning"
            found.append(StateEvent(type_, reason, condition["message"]))
    return list(dict.fromkeys(found))


class EventWriter:
    """Writes events; that it cannot is logged and keeps nobody.

    Args:
        api: the API server.
        instance: name of this process.
    """

    def __init__(self, api: KubeApi, *, instance: str) -> None:
        self._api, self._instance = api, instance
        self._said: dict[tuple[str, str], tuple[int, str]] = {}

    async def write(self, model: Object, event: StateEvent, *, now: str) -> None:
        """Write one event about a MoEModel.

        Args:
            model: the object.
            event: what is said.
            now: the time, as RFC 3339 writes it.
        """
        name = _name(model, event)
        key = (model["metadata"]["namespace"], name)
        count, since = self._said.pop(key, (0, now))
        self._said[key] = (count + 1, since)
        while len(self._said) > MAX_KNOWN:
            del self._said[next(iter(self._said))]
        obj = self._object(model, event, name)
        obj |= {"count": count + 1, "firstTimestamp": since, "lastTimestamp": now}
        try:
            await self._api.apply(EVENT, obj)
        except ApiError as error:
            logger.warning("no event %s could be written: %s", event.reason, error)

    def _object(self, model: Object, event: StateEvent, name: str) -> Object:
        about = {key: model["metadata"][key] for key in ("namespace", "name", "uid")}
        return {
            "apiVersion": EVENT.api_version,
            "kind": EVENT.name,
            "metadata": {"name": name, "namespace": model["metadata"]["namespace"]},
            "involvedObject": {"apiVersion": model["apiVersion"], "kind": model["kind"], **about},
            "type": event.type,
            "reason": event.reason,
            "message": event.note[:MAX_NOTE_CHARS],
            "source": {"component": FIELD_MANAGER},
            "reportingComponent": FIELD_MANAGER,
            "reportingInstance": self._instance,
        }


def _name(model: Object, event: StateEvent) -> str:
    text = json.dumps([model["metadata"]["uid"], event.type, event.reason, event.note])
    return f"{model['metadata']['name']}.{hashlib.sha256(text.encode()).hexdigest()[:16]}"
