"""A reconciler over an in-memory API server, driven step by step, for tests."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from fake_kube_api import FakeKubeApi
from kube_objects import make_object

from faasmoe_operator.kube.cache import ObjectCache
from faasmoe_operator.kube.component_status import RuntimeCounts
from faasmoe_operator.kube.context import OperatorContext
from faasmoe_operator.kube.events import EventRecorder
from faasmoe_operator.kube.manifests import ControlEndpoint, Images, ModelContext
from faasmoe_operator.kube.reconciler import Reconciler, ReconcileResult
from faasmoe_operator.kube.types import (
    DEPLOYMENT,
    EVENT,
    JOB,
    MOEMODEL,
    POD,
    Kind,
    ModelKey,
    Object,
)

KEY = ModelKey("llm", "moe")
ENDED_AT = 1_787_990_400.0  # when Jobs finish: 2026-08-29T08:00:00Z
SUMMARY = {
    "digest": "sha256:" + "0" * 64,
    "source": "hf://org/moe",
    "family": "qwen2_moe",
    "architecture": "Qwen2MoeForCausalLM",
    "dtype": "bfloat16",
    "hiddenSize": 2048,
    "vocabSize": 1000,
    "maxPositionEmbeddings": 8192,
    "numHiddenLayers": 24,
    "sizeBytes": 1 << 30,
    "routerBytes": 1 << 28,
    "layers": [
        {"count": 24, "numExperts": 60, "topK": 4, "expertBytes": 1 << 20, "sharedBytes": 0}
    ],
}
COUNTS = RuntimeCounts(functions=72, active=1, replicas=1, sandboxes=2, ready=2, generic=1)


class FakeRuntimes:
    """Runtimes that record calls and report fixed counters."""

    def __init__(self) -> None:
        self.running: dict[ModelKey, ModelContext] = {}
        self.removed: list[tuple[ModelKey, bool]] = []
        self.reported_counts: RuntimeCounts | None = COUNTS
        self.error: Exception | None = None

    async def ensure(self, ctx: ModelContext) -> None:
        if self.error is not None:
            raise self.error
        self.running[ModelKey(ctx.namespace, ctx.name)] = ctx

    async def remove(self, key: ModelKey, *, delete_sandboxes: bool) -> None:
        if self.running.pop(key, None) is not None:
            self.removed.append((key, delete_sandboxes))

    def counts(self, key: ModelKey) -> RuntimeCounts | None:
        return self.reported_counts if key in self.running else None


class ReconcilerScenario:
    """One operator and one fake cluster; time passes only by setting `now`."""

    def __init__(self) -> None:
        self.cache = ObjectCache()
        self.api = FakeKubeApi(self.cache)
        self.runtimes = FakeRuntimes()
        self.now = 1_788_000_000.0
        self.served_apis: frozenset[str] = frozenset()
        self.restart()

    def restart(self) -> None:
        """Replace the reconciler, as a new process would; only the cache remains."""
        context = OperatorContext(
            Images("router:1", "expert:1"),
            ControlEndpoint("http://operator:8090", "faasmoe-system", {"app": "operator"}, 8090),
            b"r" * 32,
            served_apis=lambda: self.served_apis,
        )
        self.reconciler = Reconciler(
            self.api,
            self.cache,
            self.runtimes,
            context,
            events=EventRecorder(self.api, instance="operator-0"),
            clock=lambda: self.now,
            wall_clock=lambda: self.now,
        )

    def apply_model(self, **spec: Any) -> None:
        """Apply the MoEModel, as a user."""
        obj = make_object(MOEMODEL, "moe", uid="uid-moe")
        del obj["metadata"]["resourceVersion"]
        known = self.api.objects.get((MOEMODEL, "llm", "moe"), {})
        self.api.write({**known, **obj, "spec": {"model": {"source": "hf://org/moe"}, **spec}})

    def reconcile(self) -> ReconcileResult:
        return asyncio.run(self.reconciler.reconcile(KEY))

    def reconcile_until_idle(self) -> ReconcileResult:
        """Reconcile until a reconcile sends no request."""
        for _ in range(10):
            self.api.writes()
            result = self.reconcile()
            if not self.api.requests:
                return result
            self.now += 60
        raise AssertionError(f"still sends requests: {self.api.requests}")

    def prepare_store(self) -> None:
        """Let the store Job succeed."""
        self.end_job("Complete", json.dumps({"ok": True, **SUMMARY}))

    def end_job(self, condition_type: str, message: str) -> None:
        job = self.live(JOB, "moe-store")
        pod = make_object(
            POD,
            "moe-store-x",
            uid=f"pod-of-{job['metadata']['uid']}",
            owner=job["metadata"]["uid"],
            labels=job["spec"]["template"]["metadata"]["labels"],
        )
        del pod["metadata"]["resourceVersion"]
        ended = {"exitCode": 0, "message": message, "finishedAt": "2026-09-01T12:00:00Z"}
        pod["status"] = {"containerStatuses": [{"name": "c", "state": {"terminated": ended}}]}
        self.api.write(pod)
        condition = {
            "type": condition_type,
            "status": "True",
            "lastTransitionTime": "2026-08-29T08:00:00Z",
        }
        self.api.set_status(JOB, "llm", "moe-store", conditions=[condition])

    def start_routers(self, n: int = 1) -> None:
        deployment = self.live(DEPLOYMENT, "moe-router")
        counts = ("replicas", "readyReplicas", "updatedReplicas", "availableReplicas")
        self.api.set_status(
            DEPLOYMENT,
            "llm",
            "moe-router",
            observedGeneration=deployment["metadata"]["generation"],
            **dict.fromkeys(counts, n),
        )

    def serve(self) -> None:
        """Bring the model to Ready, as a cluster would."""
        self.reconcile()
        self.prepare_store()
        self.reconcile()
        self.start_routers()
        self.reconcile_until_idle()

    def live(self, kind: Kind, name: str) -> Object:
        return self.api.objects[kind, "llm", name]

    @property
    def status(self) -> Object:
        status: Object = self.live(MOEMODEL, "moe")["status"]
        return status

    def condition(self, kind: str) -> Object:
        return next(c for c in self.status["conditions"] if c["type"] == kind)

    def condition_state(self, kind: str) -> tuple[str, str]:
        condition = self.condition(kind)
        return condition["status"], condition["reason"]

    def events(self) -> list[tuple[str, str]]:
        """Return type and reason of every Event."""
        return [
            (obj["type"], obj["reason"])
            for (kind, _, _), obj in self.api.objects.items()
            if kind == EVENT
        ]
