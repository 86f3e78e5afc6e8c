import asyncio

import pytest
from fake_kube_api import FakeKubeApi
from kube_objects import make_object

from faasmoe_operator.kube.errors import Forbidden
from faasmoe_operator.kube.events import EventRecorder, ModelEvent, transition_events
from faasmoe_operator.kube.types import EVENT, MOEMODEL, Object

MODEL = make_object(MOEMODEL, "moe")
NOW, LATER = "2026-09-01T12:00:00Z", "2026-09-01T12:05:00Z"


def make_condition(kind: str, status: str, reason: str) -> Object:
    return {"type": kind, "status": status, "reason": reason, "message": "message"}


@pytest.mark.parametrize(
    ("previous", "current", "event_type"),
    [
        (None, ("StoreReady", "Unknown", "Preparing"), None),
        (("Unknown", "Preparing"), ("StoreReady", "True", "Prepared"), "Normal"),
        (("True", "Prepared"), ("StoreReady", "True", "Prepared"), None),
        (("Unknown", "Preparing"), ("StoreReady", "False", "NoSpace"), "Warning"),
        (("False", "NoSpace"), ("StoreReady", "False", "NoSpace"), None),
        (("False", "NoSpace"), ("StoreReady", "False", "HubUnavailable"), "Warning"),
        (("False", "NoSpace"), ("StoreReady", "Unknown", "Preparing"), None),
        (("Unknown", "Starting"), ("Ready", "True", "Ready"), "Normal"),
        (("True", "Ready"), ("Ready", "False", "NoSpace"), None),
        (("True", "Ready"), ("Ready", "False", "Suspended"), "Normal"),
        (("True", "Ready"), ("Ready", "False", "SpecInvalid"), "Warning"),
        (("True", "Serving"), ("Active", "False", "NoTraffic"), None),
    ],
)
def test_events_are_recorded_for_transitions_only(
    previous: tuple[str, str] | None, current: tuple[str, str, str], event_type: str | None
) -> None:
    previous_conditions = [] if previous is None else [make_condition(current[0], *previous)]
    events = transition_events(previous_conditions, [make_condition(*current)])
    assert [event.type for event in events] == ([] if event_type is None else [event_type])
    assert all((event.reason, event.note) == (current[2], "message") for event in events)


def record_events(*events: ModelEvent) -> list[Object]:
    api = FakeKubeApi()
    recorder = EventRecorder(api, instance="operator-0")

    async def scenario() -> None:
        for event, now in zip(events, (NOW, LATER), strict=False):
            await recorder.record(MODEL, event, now=now)

    asyncio.run(scenario())
    return [obj for (kind, _, _), obj in api.objects.items() if kind == EVENT]


FULL = ModelEvent("Warning", "NoSpace", "the claim is full")


def test_an_event_refers_to_its_model() -> None:
    (event,) = record_events(FULL)
    assert event["involvedObject"]["uid"] == MODEL["metadata"]["uid"]
    assert event["metadata"]["namespace"] == "llm"
    assert (event["type"], event["reason"], event["message"]) == (
        "Warning",
        "NoSpace",
        "the claim is full",
    )


def test_a_repeated_event_increases_the_count() -> None:
    (event,) = record_events(FULL, FULL)
    assert (event["count"], event["firstTimestamp"], event["lastTimestamp"]) == (2, NOW, LATER)


def test_another_note_is_another_event() -> None:
    assert len(record_events(FULL, ModelEvent("Warning", "NoSpace", "another claim is full"))) == 2


def test_a_rejected_event_is_ignored() -> None:
    api = FakeKubeApi()
    api.errors["apply", EVENT] = Forbidden("no", status=403)
    asyncio.run(EventRecorder(api, instance="o").record(MODEL, FULL, now=NOW))
