"""Kubernetes events about changes of a model's conditions, for `kubectl describe`.

An event's name is a hash of its content, so that a repeated event increases a count.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from faasmoe_operator.kube.client import KubeApi
from faasmoe_operator.kube.conditions import ACTIVE, READY
from faasmoe_operator.kube.errors import KubeApiError
from faasmoe_operator.kube.manifests.names import FIELD_MANAGER
from faasmoe_operator.kube.types import EVENT, Object

logger = logging.getLogger(__name__)

MAX_NOTE_CHARS = 1024
MAX_RECORDED = 10_000


@dataclass(frozen=True, slots=True)
class ModelEvent:
    """An event to record.

    Attributes:
        type: Warning if someone may have to act.
        reason: CamelCase word, stable for machines.
        note: the event in words.
    """

    type: Literal["Normal", "Warning"]
    reason: str
    note: str


def transition_events(previous: Iterable[Object], current: Iterable[Object]) -> list[ModelEvent]:
    """Return the events of a change of conditions: recoveries and new failures. Pure.

    Active follows the traffic and yields no events. Ready repeats another condition, so it yields
    an event only when it becomes True, or for reasons of its own.
    """
    previous_by_type = {condition.get("type"): condition for condition in previous}
    events = []
    for condition in current:
        condition_type, status, reason = condition["type"], condition["status"], condition["reason"]
        old = previous_by_type.get(condition_type, {})
        if condition_type == ACTIVE or (old.get("status"), old.get("reason")) == (status, reason):
            continue
        is_transition = old.get("status") != status
        if status == "True" and is_transition and old.get("status") is not None:
            events.append(ModelEvent("Normal", reason, condition["message"]))
        elif status == "False" and (
            condition_type != READY or reason in ("SpecInvalid", "Suspended")
        ):
            type_: Literal["Normal", "Warning"] = "Normal" if reason == "Suspended" else "Warning"
            events.append(ModelEvent(type_, reason, condition["message"]))
    return list(dict.fromkeys(events))


class EventRecorder:
    """Records events in the API; failures are logged only.

    Args:
        api: the API server.
        instance: name of this process.
    """

    def __init__(self, api: KubeApi, *, instance: str) -> None:
        self._api, self._instance = api, instance
        self._recorded: dict[tuple[str, str], tuple[int, str]] = {}

    async def record(self, model: Object, event: ModelEvent, *, now: str) -> None:
        """Record an event about a MoEModel, or increase its count.

        Args:
            model: the MoEModel's API object.
            event: the event.
            now: the time in RFC 3339 format.
        """
        name = _event_name(model, event)
        key = (model["metadata"]["namespace"], name)
        count, first_seen = self._recorded.pop(key, (0, now))
        self._recorded[key] = (count + 1, first_seen)
        while len(self._recorded) > MAX_RECORDED:
            del self._recorded[next(iter(self._recorded))]
        obj = self._event_object(model, event, name)
        obj |= {"count": count + 1, "firstTimestamp": first_seen, "lastTimestamp": now}
        try:
            await self._api.apply(EVENT, obj)
        except KubeApiError as error:
            logger.warning("event %s not recorded: %s", event.reason, error)

    def _event_object(self, model: Object, event: ModelEvent, name: str) -> Object:
        object_reference = {key: model["metadata"][key] for key in ("namespace", "name", "uid")}
        return {
            "apiVersion": EVENT.api_version,
            "kind": EVENT.name,
            "metadata": {"name": name, "namespace": model["metadata"]["namespace"]},
            "involvedObject": {
                "apiVersion": model["apiVersion"],
                "kind": model["kind"],
                **object_reference,
            },
            "type": event.type,
            "reason": event.reason,
            "message": event.note[:MAX_NOTE_CHARS],
            "source": {"component": FIELD_MANAGER},
            "reportingComponent": FIELD_MANAGER,
            "reportingInstance": self._instance,
        }


def _event_name(model: Object, event: ModelEvent) -> str:
    text = json.dumps([model["metadata"]["uid"], event.type, event.reason, event.note])
    return f"{model['metadata']['name']}.{hashlib.sha256(text.encode()).hexdigest()[:16]}"
