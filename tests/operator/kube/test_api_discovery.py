"""Optional APIs that come and go while the operator runs."""

import asyncio
from typing import Any

import pytest
from kube_objects import make_object

from faasmoe_operator.api.v1alpha1.moemodel import MoEModelSpec
from faasmoe_operator.kube.api_discovery import REQUESTING_FIELDS, OptionalApis
from faasmoe_operator.kube.cache import ObjectCache
from faasmoe_operator.kube.errors import Unavailable
from faasmoe_operator.kube.types import (
    HTTP_ROUTE,
    MOEMODEL,
    OPTIONAL_KINDS,
    SERVICE_MONITOR,
    Kind,
    ModelKey,
)

MONITORED: dict[str, Any] = {"monitoring": {"serviceMonitor": {}}}
ROUTED: dict[str, Any] = {"networking": {"httpRoute": {"parentRefs": [{"name": "public"}]}}}


class Scenario:
    """A cluster to which APIs come and from which they go."""

    def __init__(self, *served: Kind) -> None:
        self.served = set(served)
        self.is_away = False
        self.discovered: list[Kind] = []
        self.started: set[Kind] = set()
        self.enqueued: list[str] = []
        self.cache = ObjectCache()
        self.apis = OptionalApis(self, self.cache, enqueue=self._enqueue)

    async def is_served(self, kind: Kind) -> bool:
        self.discovered.append(kind)
        if self.is_away:
            raise Unavailable("away", status=503)
        return kind in self.served

    def start_optional(self, kind: Kind) -> None:
        self.started.add(kind)

    def stop_optional(self, kind: Kind) -> None:
        self.started.remove(kind)

    def apply_model(self, name: str, spec: dict[str, Any]) -> None:
        """A user applies a MoEModel."""
        self.cache.update(MOEMODEL, {**make_object(MOEMODEL, name), "spec": spec})

    def start(self) -> None:
        asyncio.run(self.apis.start(self))
        self.discovered.clear()

    def discover_missing(self) -> None:
        asyncio.run(self.apis.discover_missing())

    def _enqueue(self, key: ModelKey) -> None:
        self.enqueued.append(key.name)


def test_begins_with_what_is_served() -> None:
    story = Scenario(SERVICE_MONITOR)
    story.start()
    assert story.started == {SERVICE_MONITOR}
    assert story.apis.served_versions() == {"monitoring.coreos.com/v1"}


def test_asks_nothing_while_nobody_asks_for_what_is_missing() -> None:
    story = Scenario(SERVICE_MONITOR)
    story.start()
    story.apply_model("monitored", MONITORED)
    story.apply_model("plain", {"networking": {}})
    story.discover_missing()
    assert story.discovered == []


def test_finds_what_has_come_and_has_those_visited_that_ask_for_it() -> None:
    story = Scenario()
    story.start()
    story.apply_model("monitored", MONITORED)
    story.apply_model("routed", ROUTED)
    story.discover_missing()
    assert story.discovered == [HTTP_ROUTE, SERVICE_MONITOR]
    assert story.started == set()

    story.served.add(SERVICE_MONITOR)
    story.discover_missing()
    assert story.started == {SERVICE_MONITOR}
    assert story.enqueued == ["monitored"]
    story.discovered.clear()
    story.discover_missing()
    assert story.discovered == [HTTP_ROUTE]


def test_a_cluster_that_does_not_answer_is_asked_again() -> None:
    story = Scenario(SERVICE_MONITOR)
    story.is_away = True
    with pytest.raises(Unavailable):
        story.start()
    story.is_away = False
    story.start()
    assert story.started == {SERVICE_MONITOR}

    story.apply_model("routed", ROUTED)
    story.served.add(HTTP_ROUTE)
    story.is_away = True
    story.discover_missing()
    story.is_away = False
    story.discover_missing()
    assert story.started == {SERVICE_MONITOR, HTTP_ROUTE}


def test_lets_go_what_has_gone_and_finds_it_when_it_comes_back() -> None:
    story = Scenario(HTTP_ROUTE)
    story.start()
    story.apply_model("routed", ROUTED)
    story.served.clear()
    story.apis.mark_not_served(HTTP_ROUTE)
    assert story.started == set()
    assert story.apis.served_versions() == frozenset()
    assert story.enqueued == ["routed"]
    story.apis.mark_not_served(MOEMODEL)
    story.discover_missing()
    assert story.started == set()

    story.served.add(HTTP_ROUTE)
    story.discover_missing()
    assert story.started == {HTTP_ROUTE}
    assert story.enqueued == ["routed", "routed"]


@pytest.mark.parametrize("kind", OPTIONAL_KINDS, ids=str)
def test_knows_the_field_that_asks_for_each(kind: Kind) -> None:
    part, name = REQUESTING_FIELDS[kind]
    section = MoEModelSpec.model_fields[part].annotation
    assert section is not None
    assert name in {field.alias for field in section.model_fields.values()}
