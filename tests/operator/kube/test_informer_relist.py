import asyncio

import pytest
from fake_kube_api import FakeKubeApi
from kube_objects import make_object

from faasmoe_operator.kube.cache import ObjectCache
from faasmoe_operator.kube.errors import NotFound, Unavailable
from faasmoe_operator.kube.informer import (
    RELIST_DELAY_S,
    RELIST_PERIOD_S,
    Relister,
    label_selector_for,
)
from faasmoe_operator.kube.types import JOB, MOEMODEL, POD, SERVICE_MONITOR, Kind, Object

MANAGED_LABELS = {"app.kubernetes.io/managed-by": "faasmoe-operator"}


class Scenario:
    """A cache that no watch fills."""

    def __init__(self, *namespaces: str) -> None:
        self.api, self.cache, self.now = FakeKubeApi(), ObjectCache(), 0.0
        self.not_served: list[Kind] = []
        self.relister = Relister(
            self.api,
            self.cache,
            kinds=(MOEMODEL, POD, JOB),
            namespaces=namespaces,
            on_not_served=self.not_served.append,
            clock=lambda: self.now,
        )
        self.list_all()

    def list_all(self) -> None:
        asyncio.run(self.relister.list_all())
        self.api.requests.clear()

    def put(self, name: str, **rest: object) -> Object:
        pod = make_object(POD, name, labels=MANAGED_LABELS, **rest)  # type: ignore[arg-type]
        return self.api.write(pod)

    def relisted_kinds(self) -> list[str]:
        """Return the kinds that are listed now."""
        asyncio.run(self.relister.relist_due())
        listed = [kind for verb, kind, _ in self.api.requests if verb == "list"]
        self.api.requests.clear()
        return listed

    def names(self) -> set[str]:
        return {pod["metadata"]["name"] for pod in self.cache.list_all(POD)}


def test_fills_the_cache_with_what_is_ours() -> None:
    story = Scenario()
    story.put("ours")
    story.api.write(make_object(POD, "theirs"))
    story.list_all()
    assert story.names() == {"ours"}


def test_looks_only_where_it_is_to_look() -> None:
    story = Scenario("llm", "lab")
    story.put("a")
    story.put("b", namespace="elsewhere")
    story.list_all()
    assert story.names() == {"a"}


def test_finds_what_went_unnoticed() -> None:
    story = Scenario()
    story.put("gone")
    story.put("stays")
    story.list_all()
    story.api.remove(POD, "llm", "gone")
    assert story.names() == {"gone", "stays"}
    story.now += RELIST_PERIOD_S
    assert story.relisted_kinds() == ["MoEModel", "Pod", "Job"]
    assert story.names() == {"stays"}


def test_lists_a_kind_soon_when_there_is_reason_to_doubt() -> None:
    story = Scenario()
    story.relister.schedule_relist(POD)
    assert story.relisted_kinds() == []
    story.now += RELIST_DELAY_S
    assert story.relisted_kinds() == ["Pod"]
    assert story.relisted_kinds() == []


def test_lists_all_kinds_soon_after_an_interruption() -> None:
    story = Scenario()
    story.relister.schedule_relist()
    story.now += RELIST_DELAY_S
    assert story.relisted_kinds() == ["MoEModel", "Pod", "Job"]


def test_many_doubts_are_one() -> None:
    story = Scenario()
    for _ in range(10):
        story.now += RELIST_DELAY_S / 10
        story.relister.schedule_relist(POD)
    story.now += RELIST_DELAY_S / 10
    assert story.relisted_kinds() == ["Pod"]
    assert story.relisted_kinds() == []


def test_a_list_that_is_refused_is_asked_for_again() -> None:
    story = Scenario()
    story.api.errors["list", POD] = Unavailable("away", status=503)
    story.now += RELIST_PERIOD_S
    story.relisted_kinds()
    story.api.errors.clear()
    assert story.relisted_kinds() == []
    story.now += RELIST_DELAY_S
    assert story.relisted_kinds() == ["Pod"]


def test_the_first_list_must_succeed() -> None:
    story = Scenario()
    story.api.errors["list", JOB] = Unavailable("away", status=503)
    with pytest.raises(Unavailable):
        story.list_all()


def test_lists_a_kind_that_has_come_at_once_and_soon_again() -> None:
    story = Scenario()
    story.api.write(make_object(SERVICE_MONITOR, "moe-router", labels=MANAGED_LABELS))
    story.relister.add_kind(SERVICE_MONITOR)
    assert story.relisted_kinds() == ["ServiceMonitor"]
    assert len(story.cache.list_all(SERVICE_MONITOR)) == 1
    story.now += RELIST_DELAY_S
    assert story.relisted_kinds() == ["ServiceMonitor"]
    story.now += RELIST_DELAY_S
    assert story.relisted_kinds() == []


def test_a_kind_that_is_served_no_more_is_told_and_can_be_forgotten() -> None:
    story = Scenario()
    story.api.write(make_object(SERVICE_MONITOR, "moe-router", labels=MANAGED_LABELS))
    story.relister.add_kind(SERVICE_MONITOR)
    story.relisted_kinds()
    story.api.errors["list", SERVICE_MONITOR] = NotFound("no such API", status=404)
    story.now += RELIST_DELAY_S
    story.relisted_kinds()
    assert story.not_served == [SERVICE_MONITOR]
    story.relister.remove_kind(SERVICE_MONITOR)
    assert story.cache.list_all(SERVICE_MONITOR) == []
    story.now += RELIST_DELAY_S
    assert story.relisted_kinds() == []


def test_models_are_everyones_and_other_objects_only_ours() -> None:
    assert label_selector_for(MOEMODEL) == ""
    assert label_selector_for(POD) == "app.kubernetes.io/managed-by=faasmoe-operator"
