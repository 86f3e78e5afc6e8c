"""Scales the routers of models with `router.scaling` by the requests that gateways report.

A request that finds no router wakes one; the gateways keep the request meanwhile. Deployments are
scaled by the reconciler, which asks `desired`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from faasmoe_operator.api.v1alpha1 import MoEModel, MoEModelError
from faasmoe_operator.api.v1alpha1.router import RouterSpec
from faasmoe_operator.control.gateway_links import GatewayLinks
from faasmoe_operator.control.router_scaler import RouterScaler
from faasmoe_operator.kube.cache import ObjectCache
from faasmoe_operator.kube.manifests.names import router_name
from faasmoe_operator.kube.types import DEPLOYMENT, MOEMODEL, ModelKey, Object

TICK_S = 1.0


@dataclass(slots=True)
class _ScaledModel:
    """A model whose routers are scaled, as long as its uid and its settings stay."""

    uid: str
    generation: int
    router: RouterSpec
    scaler: RouterScaler


class RouterDemandScaler:
    """Decides how many routers of each model run.

    Args:
        cache: the object cache.
        links: what gateways report.
        enqueue: called with each model whose number has changed.
        clock: Unix time, in seconds.
    """

    def __init__(
        self,
        cache: ObjectCache,
        links: GatewayLinks,
        *,
        enqueue: Callable[[ModelKey], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._cache = cache
        self._links = links
        self._enqueue = enqueue
        self._clock = clock
        self._models: dict[ModelKey, _ScaledModel] = {}

    def desired(self, key: ModelKey) -> int | None:
        """Return how many routers of a model should run; None if they are not scaled."""
        obj = self._cache.get(MOEMODEL, *key)
        model = None if obj is None else self._scaled_model(key, obj)
        return None if model is None else model.scaler.desired

    async def run(self) -> None:
        """Decide once a second until cancelled."""
        while True:
            self.tick()
            await asyncio.sleep(TICK_S)

    def tick(self) -> None:
        """Decide about every model."""
        now = self._clock()
        objects = self._cache.list_all(MOEMODEL)
        known = {ModelKey(obj["metadata"]["namespace"], obj["metadata"]["name"]) for obj in objects}
        for key in self._models.keys() - known:
            self._links.remove(str(key))
            del self._models[key]
        for obj in objects:
            key = ModelKey(obj["metadata"]["namespace"], obj["metadata"]["name"])
            if (model := self._scaled_model(key, obj)) is None:
                continue
            before, n_ready = model.scaler.desired, self._n_ready(key)
            if before and not n_ready:
                continue  # how long a start takes is no idle time
            model.scaler.tick(now, n_ready=n_ready)
            if model.scaler.desired != before:
                self._enqueue(key)

    def _scaled_model(self, key: ModelKey, obj: Object) -> _ScaledModel | None:
        """Return a model's scaler, made anew if its settings have changed."""
        if obj.get("spec", {}).get("router", {}).get("scaling") is None:
            if self._models.pop(key, None) is not None:
                self._links.remove(str(key))
            return None
        uid, generation = obj["metadata"]["uid"], obj["metadata"].get("generation", 0)
        known = self._models.get(key)
        if known is not None and (known.uid, known.generation) == (uid, generation):
            return known
        try:
            router = MoEModel.from_object(obj).spec.router
        except MoEModelError:
            return known  # as it was: the reconciler says what is wrong
        if known is not None and known.uid == uid and known.router == router:
            known.generation = generation
            return known
        scaler = RouterScaler(
            router.scaling, router.max_num_seqs, self._clock(), replicas=self._n_replicas(key)
        )
        model = self._models[key] = _ScaledModel(uid, generation, router, scaler)
        self._links.add(str(key), lambda: self._take_demand(key))
        self._take_demand(key)
        return model

    def _take_demand(self, key: ModelKey) -> None:
        model = self._models.get(key)
        if model is None:
            return
        was_at_zero = model.scaler.desired == 0
        model.scaler.set_demand(self._links.n_requests(str(key)), self._clock())
        if was_at_zero and model.scaler.desired:
            self._enqueue(key)

    def _n_replicas(self, key: ModelKey) -> int | None:
        """Return how many routers the Deployment asks for; None if there is none yet."""
        deployment = self._cache.get(DEPLOYMENT, key.namespace, router_name(key.name))
        return None if deployment is None else deployment["spec"].get("replicas", 1)

    def _n_ready(self, key: ModelKey) -> int:
        deployment = self._cache.get(DEPLOYMENT, key.namespace, router_name(key.name))
        return 0 if deployment is None else deployment.get("status", {}).get("readyReplicas", 0)
