"""Optional APIs that appear and disappear while the operator runs."""

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
    """A cluster whose APIs appear and disappear."""

    def __init__(self, *served: Kind) -> None:
        self.served = set(served)
        self.is_unavailable = False
        self.discovered: list[Kind] = []
        self.started: set[Kind] = set()
        self.enqueued: list[str] = []
        self.cache = ObjectCache()
        self.apis = OptionalApis(self, self.cache, enqueue=self._enqueue)

    async def is_served(self, kind: Kind) -> bool:
        self.discovered.append(kind)
        if self.is_unavailable:
            raise Unavailable("unavailable", status=503)
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


def test_start_follows_the_kinds_that_are_served() -> None:
    scenario = Scenario(SERVICE_MONITOR)
    scenario.start()
    assert scenario.started == {SERVICE_MONITOR}
    assert scenario.apis.served_versions() == {"monitoring.coreos.com/v1"}


def test_sends_no_discovery_request_unless_a_model_requests_a_missing_kind() -> None:
    scenario = Scenario(SERVICE_MONITOR)
    scenario.start()
    scenario.apply_model("monitored", MONITORED)
    scenario.apply_model("plain", {"networking": {}})
    scenario.discover_missing()
    assert scenario.discovered == []


def test_follows_a_kind_that_appears_and_enqueues_its_requesters() -> None:
    scenario = Scenario()
    scenario.start()
    scenario.apply_model("monitored", MONITORED)
    scenario.apply_model("routed", ROUTED)
    scenario.discover_missing()
    assert scenario.discovered == [HTTP_ROUTE, SERVICE_MONITOR]
    assert scenario.started == set()

    scenario.served.add(SERVICE_MONITOR)
    scenario.discover_missing()
    assert scenario.started == {SERVICE_MONITOR}
    assert scenario.enqueued == ["monitored"]
    scenario.discovered.clear()
    scenario.discover_missing()
    assert scenario.discovered == [HTTP_ROUTE]


def test_retries_discovery_after_a_failure() -> None:
    scenario = Scenario(SERVICE_MONITOR)
    scenario.is_unavailable = True
    with pytest.raises(Unavailable):
        scenario.start()
    scenario.is_unavailable = False
    scenario.start()
    assert scenario.started == {SERVICE_MONITOR}

    scenario.apply_model("routed", ROUTED)
    scenario.served.add(HTTP_ROUTE)
    scenario.is_unavailable = True
    scenario.discover_missing()
    scenario.is_unavailable = False
    scenario.discover_missing()
    assert scenario.started == {SERVICE_MONITOR, HTTP_ROUTE}


def test_stops_following_a_removed_kind_and_resumes_when_it_returns() -> None:
    scenario = Scenario(HTTP_ROUTE)
    scenario.start()
    scenario.apply_model("routed", ROUTED)
    scenario.served.clear()
    scenario.apis.mark_not_served(HTTP_ROUTE)
    assert scenario.started == set()
    assert scenario.apis.served_versions() == frozenset()
    assert scenario.enqueued == ["routed"]
    scenario.apis.mark_not_served(MOEMODEL)
    scenario.discover_missing()
    assert scenario.started == set()

    scenario.served.add(HTTP_ROUTE)
    scenario.discover_missing()
    assert scenario.started == {HTTP_ROUTE}
    assert scenario.enqueued == ["routed", "routed"]


@pytest.mark.parametrize("kind", OPTIONAL_KINDS, ids=str)
def test_every_optional_kind_has_a_requesting_field_in_the_spec(kind: Kind) -> None:
    part, name = REQUESTING_FIELDS[kind]
    section = MoEModelSpec.model_fields[part].annotation
    assert section is not None
    assert name in {field.alias for field in section.model_fields.values()}
