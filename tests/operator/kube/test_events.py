import asyncio

import pytest
from fake_kube_api import FakeKubeApi
from kube_objects import make_object

from faasmoe_operator.kube.errors import Forbidden
from faasmoe_operator.kube.events import EventRecorder, ModelEvent, transition_events
from faasmoe_operator.kube.types import EVENT, MOEMODEL, Object

MODEL = make_object(MOEMODEL, "moe")
NOW, LATER = "2026-09-01T12:00:00Z", "2026-09-01T12:05:00Z"


def a_condition(kind: str, status: str, reason: str) -> Object:
    return {"type": kind, "status": status, "reason": reason, "message": "so it is"}


@pytest.mark.parametrize(
    ("before", "after", "told"),
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
def test_tells_changes_of_state_only(
    before: tuple[str, str] | None, after: tuple[str, str, str], told: str | None
) -> None:
    known = [] if before is None else [a_condition(after[0], *before)]
    events = transition_events(known, [a_condition(*after)])
    assert [event.type for event in events] == ([] if told is None else [told])
    assert all((event.reason, event.note) == (after[2], "so it is") for event in events)


def written(*events: ModelEvent) -> list[Object]:
    api = FakeKubeApi()
    writer = EventRecorder(api, instance="operator-0")

    async def story() -> None:
        for event, now in zip(events, (NOW, LATER), strict=False):
            await writer.record(MODEL, event, now=now)

    asyncio.run(story())
    return [obj for (kind, _, _), obj in api.objects.items() if kind == EVENT]


FULL = ModelEvent("Warning", "NoSpace", "the claim is full")


def test_an_event_is_about_its_model() -> None:
    (event,) = written(FULL)
    assert event["involvedObject"]["uid"] == MODEL["metadata"]["uid"]
    assert event["metadata"]["namespace"] == "llm"
    assert (event["type"], event["reason"], event["message"]) == (
        "Warning",
        "NoSpace",
        "the claim is full",
    )


def test_what_is_said_again_is_counted() -> None:
    (event,) = written(FULL, FULL)
    assert (event["count"], event["firstTimestamp"], event["lastTimestamp"]) == (2, NOW, LATER)


def test_what_is_said_otherwise_is_another_event() -> None:
    assert len(written(FULL, ModelEvent("Warning", "NoSpace", "another claim is full"))) == 2


def test_an_event_that_is_refused_keeps_nobody() -> None:
    api = FakeKubeApi()
    api.errors["apply", EVENT] = Forbidden("no", status=403)
    asyncio.run(EventRecorder(api, instance="o").record(MODEL, FULL, now=NOW))
