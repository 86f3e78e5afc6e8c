"""Optional APIs that come and go while the operator runs."""

import asyncio
from typing import Any

import pytest
from kube_objects import an_object

from faasmoe_operator.kube.cache import ObjectCache
from faasmoe_operator.kube.errors import Unavailable
from faasmoe_operator.kube.keys import ModelKey
from faasmoe_operator.kube.kinds import HTTP_ROUTE, MOEMODEL, OPTIONAL, SERVICE_MONITOR, Kind
from faasmoe_operator.kube.optional_apis import FIELDS, OptionalApis
from faasmoe_operator.spec.moemodel import ModelSpec

MONITORED: dict[str, Any] = {"monitoring": {"serviceMonitor": {}}}
ROUTED: dict[str, Any] = {"networking": {"httpRoute": {"parentRefs": [{"name": "public"}]}}}


class Story:
    """A cluster to which APIs come and from which they go."""

    def __init__(self, *served: Kind) -> None:
        self.served = set(served)
        self.is_away = False
        self.asked: list[Kind] = []
        self.followed: set[Kind] = set()
        self.visited: list[str] = []
        self.cache = ObjectCache()
        self.apis = OptionalApis(self, self.cache, visit=self._visit)

    async def serves(self, kind: Kind) -> bool:
        self.asked.append(kind)
        if self.is_away:
            raise Unavailable("away", status=503)
        return kind in self.served

    def follow(self, kind: Kind) -> None:
        self.followed.add(kind)

    def leave(self, kind: Kind) -> None:
        self.followed.remove(kind)

    def ask(self, name: str, spec: dict[str, Any]) -> None:
        """A user applies a MoEModel."""
        self.cache.put(MOEMODEL, {**an_object(MOEMODEL, name), "spec": spec})

    def begin(self) -> None:
        asyncio.run(self.apis.begin(self))
        self.asked.clear()

    def look(self) -> None:
        asyncio.run(self.apis.look())

    def _visit(self, key: ModelKey) -> None:
        self.visited.append(key.name)


def test_begins_with_what_is_served() -> None:
    story = Story(SERVICE_MONITOR)
    story.begin()
    assert story.followed == {SERVICE_MONITOR}
    assert story.apis.versions() == {"monitoring.coreos.com/v1"}


def test_asks_nothing_while_nobody_asks_for_what_is_missing() -> None:
    story = Story(SERVICE_MONITOR)
    story.begin()
    story.ask("monitored", MONITORED)
    story.ask("plain", {"networking": {}})
    story.look()
    assert story.asked == []


def test_finds_what_has_come_and_has_those_visited_that_ask_for_it() -> None:
    story = Story()
    story.begin()
    story.ask("monitored", MONITORED)
    story.ask("routed", ROUTED)
    story.look()
    assert story.asked == [HTTP_ROUTE, SERVICE_MONITOR]
    assert story.followed == set()

    story.served.add(SERVICE_MONITOR)
    story.look()
    assert story.followed == {SERVICE_MONITOR}
    assert story.visited == ["monitored"]
    story.asked.clear()
    story.look()
    assert story.asked == [HTTP_ROUTE]


def test_a_cluster_that_does_not_answer_is_asked_again() -> None:
    story = Story(SERVICE_MONITOR)
    story.is_away = True
    with pytest.raises(Unavailable):
        story.begin()
    story.is_away = False
    story.begin()
    assert story.followed == {SERVICE_MONITOR}

    story.ask("routed", ROUTED)
    story.served.add(HTTP_ROUTE)
    story.is_away = True
    story.look()
    story.is_away = False
    story.look()
    assert story.followed == {SERVICE_MONITOR, HTTP_ROUTE}


def test_lets_go_what_has_gone_and_finds_it_when_it_comes_back() -> None:
    story = Story(HTTP_ROUTE)
    story.begin()
    story.ask("routed", ROUTED)
    story.served.clear()
    story.apis.lose(HTTP_ROUTE)
    assert story.followed == set()
    assert story.apis.versions() == frozenset()
    assert story.visited == ["routed"]
    story.apis.lose(MOEMODEL)
    story.look()
    assert story.followed == set()

    story.served.add(HTTP_ROUTE)
    story.look()
    assert story.followed == {HTTP_ROUTE}
    assert story.visited == ["routed", "routed"]


@pytest.mark.parametrize("kind", OPTIONAL, ids=str)
def test_knows_the_field_that_asks_for_each(kind: Kind) -> None:
    part, name = FIELDS[kind]
    section = ModelSpec.model_fields[part].annotation
    assert section is not None
    assert name in {field.alias for field in section.model_fields.values()}
