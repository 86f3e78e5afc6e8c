import asyncio

import pytest
from kube_fake import FakeKubeApi
from kube_objects import an_object

from faasmoe_operator.kube.cache import ObjectCache
from faasmoe_operator.kube.errors import NotFound, Unavailable
from faasmoe_operator.kube.kinds import JOB, MOEMODEL, POD, SERVICE_MONITOR, Kind, Object
from faasmoe_operator.kube.resync import DOUBT_S, PERIOD_S, Resync, selector_of

OURS = {"app.kubernetes.io/managed-by": "faasmoe-operator"}


class Story:
    """A cache that no watch fills."""

    def __init__(self, *namespaces: str) -> None:
        self.api, self.cache, self.now = FakeKubeApi(), ObjectCache(), 0.0
        self.gone: list[Kind] = []
        self.resync = Resync(
            self.api,
            self.cache,
            kinds=(MOEMODEL, POD, JOB),
            namespaces=namespaces,
            gone=self.gone.append,
            clock=lambda: self.now,
        )
        self.fill()

    def fill(self) -> None:
        asyncio.run(self.resync.fill())
        self.api.requests.clear()

    def put(self, name: str, **rest: object) -> Object:
        pod = an_object(POD, name, labels=OURS, **rest)  # type: ignore[arg-type]
        return self.api.put(pod)

    def listed(self) -> list[str]:
        """Return the kinds that are listed now."""
        asyncio.run(self.resync.list_due())
        listed = [kind for verb, kind, _ in self.api.requests if verb == "list"]
        self.api.requests.clear()
        return listed

    def names(self) -> set[str]:
        return {pod["metadata"]["name"] for pod in self.cache.all(POD)}


def test_fills_the_cache_with_what_is_ours() -> None:
    story = Story()
    story.put("ours")
    story.api.put(an_object(POD, "theirs"))
    story.fill()
    assert story.names() == {"ours"}


def test_looks_only_where_it_is_to_look() -> None:
    story = Story("llm", "lab")
    story.put("a")
    story.put("b", namespace="elsewhere")
    story.fill()
    assert story.names() == {"a"}


def test_finds_what_went_unnoticed() -> None:
    story = Story()
    story.put("gone")
    story.put("stays")
    story.fill()
    story.api.remove(POD, "llm", "gone")
    assert story.names() == {"gone", "stays"}
    story.now += PERIOD_S
    assert story.listed() == ["MoEModel", "Pod", "Job"]
    assert story.names() == {"stays"}


def test_lists_a_kind_soon_when_there_is_reason_to_doubt() -> None:
    story = Story()
    story.resync.doubt(POD)
    assert story.listed() == []
    story.now += DOUBT_S
    assert story.listed() == ["Pod"]
    assert story.listed() == []


def test_lists_all_kinds_soon_after_an_interruption() -> None:
    story = Story()
    story.resync.doubt()
    story.now += DOUBT_S
    assert story.listed() == ["MoEModel", "Pod", "Job"]


def test_many_doubts_are_one() -> None:
    story = Story()
    for _ in range(10):
        story.now += DOUBT_S / 10
        story.resync.doubt(POD)
    story.now += DOUBT_S / 10
    assert story.listed() == ["Pod"]
    assert story.listed() == []


def test_a_list_that_is_refused_is_asked_for_again() -> None:
    story = Story()
    story.api.refusals["list", POD] = Unavailable("away", status=503)
    story.now += PERIOD_S
    story.listed()
    story.api.refusals.clear()
    assert story.listed() == []
    story.now += DOUBT_S
    assert story.listed() == ["Pod"]


def test_the_first_list_must_succeed() -> None:
    story = Story()
    story.api.refusals["list", JOB] = Unavailable("away", status=503)
    with pytest.raises(Unavailable):
        story.fill()


def test_lists_a_kind_that_has_come_at_once_and_soon_again() -> None:
    story = Story()
    story.api.put(an_object(SERVICE_MONITOR, "moe-router", labels=OURS))
    story.resync.add(SERVICE_MONITOR)
    assert story.listed() == ["ServiceMonitor"]
    assert len(story.cache.all(SERVICE_MONITOR)) == 1
    story.now += DOUBT_S
    assert story.listed() == ["ServiceMonitor"]
    story.now += DOUBT_S
    assert story.listed() == []


def test_a_kind_that_is_served_no_more_is_told_and_can_be_forgotten() -> None:
    story = Story()
    story.api.put(an_object(SERVICE_MONITOR, "moe-router", labels=OURS))
    story.resync.add(SERVICE_MONITOR)
    story.listed()
    story.api.refusals["list", SERVICE_MONITOR] = NotFound("no such API", status=404)
    story.now += DOUBT_S
    story.listed()
    assert story.gone == [SERVICE_MONITOR]
    story.resync.remove(SERVICE_MONITOR)
    assert story.cache.all(SERVICE_MONITOR) == []
    story.now += DOUBT_S
    assert story.listed() == []


def test_models_are_everyones_and_other_objects_only_ours() -> None:
    assert selector_of(MOEMODEL) == ""
    assert selector_of(POD) == "app.kubernetes.io/managed-by=faasmoe-operator"
