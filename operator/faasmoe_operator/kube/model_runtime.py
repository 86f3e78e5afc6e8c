"""Per-model runtimes: the controller of each MoEModel, supervised, in the operator process.

A runtime connects a Controller to the pods of one MoEModel (KubernetesPlatform), to their labels
and to the ConfigMaps that persist usage and popularity. Models are isolated from each other and
from the reconciler.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faasmoe_contracts.backoff import Backoff
from faasmoe_contracts.tls import TlsFolder, TlsPeer, models_name
from faasmoe_operator.aio import gather_limited
from faasmoe_operator.control.controller import Controller, ControllerTiming
from faasmoe_operator.control.metrics import ControlPlaneMetrics
from faasmoe_operator.control.model import ControlledModel
from faasmoe_operator.control.sandbox_client import SandboxClient
from faasmoe_operator.control.usage_ledger import UsageLedger, UsageLedgerWriter
from faasmoe_operator.errors import PlanError
from faasmoe_operator.kube.cache import ObjectCache, OwnedPods
from faasmoe_operator.kube.client import KubeApi
from faasmoe_operator.kube.component_status import RuntimeCounts
from faasmoe_operator.kube.manifests import ModelContext
from faasmoe_operator.kube.manifests.names import COMPONENT_LABEL, Component
from faasmoe_operator.kube.manifests.pods import store_path
from faasmoe_operator.kube.manifests.resources import resize_policy
from faasmoe_operator.kube.manifests.sandbox import SANDBOX_PORT
from faasmoe_operator.kube.platform import KubernetesPlatform, PodPlatformTiming
from faasmoe_operator.kube.pod_labels import PodLabeler
from faasmoe_operator.kube.pod_resizer import PodResizer
from faasmoe_operator.kube.sandbox_template import SandboxPodTemplate
from faasmoe_operator.kube.state_configmaps import ConfigMapUsageStore, PopularityConfigMap
from faasmoe_operator.kube.types import POD, ModelKey, Object
from faasmoe_operator.plan.fleet import SandboxState
from faasmoe_tracing import NO_TRACER, Tracer

logger = logging.getLogger(__name__)

REPORT_INTERVAL_S = 0.5
RETRY_DELAYS_S = (1.0, 5.0, 15.0, 60.0)
STABLE_AFTER_S = 120.0
CONTROLLER_TIMING = ControllerTiming(
    start_deadline_s=600.0, popularity_save_interval_s=300.0, usage_save_interval_s=60.0
)
"""An image may have to be pulled first, and frequent saves would burden etcd."""
MAX_PARALLEL_DELETES = 8


@dataclass(frozen=True, slots=True)
class RuntimeSpec:
    """What a runtime is started from; an unequal spec restarts it.

    Attributes:
        uid: uid of the MoEModel.
        model: its functions, pod template and warm pool.
        token: bearer token of its sandboxes and routers.
        ctx: the model's context; not compared, as the other fields contain what matters of it.
    """

    uid: str
    model: ControlledModel
    token: str = field(repr=False)
    ctx: ModelContext = field(repr=False, compare=False)

    @classmethod
    def from_context(cls, ctx: ModelContext) -> RuntimeSpec:
        """Return a model's spec; raises PlanError if its granularity is invalid."""
        if ctx.summary is None:
            raise PlanError("store: got none yet, expected a prepared store")
        model = ControlledModel.from_store_summary(
            ctx.model,
            ctx.summary,
            store_path=Path(store_path(ctx)),
            key=bytes.fromhex(ctx.secrets.function_key),
            template=SandboxPodTemplate.from_context(ctx),
        )
        return cls(ctx.uid, model, ctx.secrets.token, ctx)


@dataclass(frozen=True, slots=True)
class RuntimeDependencies:
    """What all runtimes share.

    Attributes:
        api: the Kubernetes API.
        cache: the object cache.
        timing: periods and deadlines of controllers.
        pod_timing: periods and deadlines of the platform.
        port: port on which sandboxes listen.
        clock: Unix time, in seconds.
        tracer: traces activations.
        tls: certificate that sandboxes are shown; None for sandboxes without TLS.
    """

    api: KubeApi
    cache: ObjectCache
    timing: ControllerTiming = CONTROLLER_TIMING
    pod_timing: PodPlatformTiming = field(default_factory=PodPlatformTiming)
    port: int = SANDBOX_PORT
    clock: Callable[[], float] = time.time
    tracer: Tracer = NO_TRACER
    tls: TlsFolder | None = None


class ModelRuntime:
    """Runs and supervises the controller of one MoEModel.

    Failures stay within the runtime: they are logged and counted, and the controller restarts
    after a delay. Each restart is a new epoch: it reads assignments back from the sandboxes, as a
    new process would, so that healthy sandboxes are kept.

    Args:
        spec: what to start from.
        deps: what all runtimes share.
        on_change: called when the counters have changed.
    """

    def __init__(
        self, spec: RuntimeSpec, deps: RuntimeDependencies, *, on_change: Callable[[], None]
    ) -> None:
        self.spec = spec
        self.controller: Controller | None = None
        """The running controller; None while it starts or has failed."""
        self._deps = deps
        self._on_change = on_change
        self._platform: KubernetesPlatform | None = None
        self._popularity: Mapping[str, float] | None = None
        self._ledger: UsageLedger | None = None
        self._metrics = ControlPlaneMetrics()  # over all controllers, so that no counter resets
        self._spec_changed = asyncio.Event()
        self._failure = ""
        self._reported_counts: RuntimeCounts | None = None

    def start(self) -> None:
        """Start in the background."""
        self._task = asyncio.create_task(self._supervise())

    def restart_with(self, spec: RuntimeSpec) -> None:
        """Restart the controller from another spec."""
        self.spec = spec
        self._spec_changed.set()

    async def stop(self) -> None:
        """Stop the controller; the sandboxes keep running."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def counts(self) -> RuntimeCounts | None:
        """Return the counters, the last ones during a restart; None before the first start."""
        controller, n_functions = self.controller, len(self.spec.model.functions)
        if controller is None:
            return (
                RuntimeCounts(n_functions, failure=self._failure)
                if self._failure
                else self._reported_counts
            )
        ready, states = controller.fleet.ready_replicas(), controller.fleet.sandbox_states()
        last_loss = self._platform.last_start_failure if self._platform is not None else ""
        return RuntimeCounts(
            functions=n_functions,
            active=len(ready),
            replicas=ready.total(),
            sandboxes=states.total(),
            ready=states[SandboxState.READY],
            generic=controller.fleet.n_generic(),
            tenant_keys=controller.load_reports.tenant_key_counts(controller.clock()),
            failure=controller.failure or last_loss,
        )

    async def _supervise(self) -> None:
        backoff = Backoff(RETRY_DELAYS_S)
        while True:
            self._spec_changed.clear()
            started_s = time.monotonic()
            error = await self._run_until_spec_change(self._run_epoch(self.spec))
            if error is None:
                continue
            if time.monotonic() - started_s > STABLE_AFTER_S:
                backoff.reset()
            delay_s = backoff.next_delay_s()
            self._failure = f"model runtime failed and restarts: {_describe_error(error)}"
            logger.error("%s: %s", self.spec.model.name, self._failure, exc_info=error)
            self._report_counts()
            await self._run_until_spec_change(asyncio.sleep(delay_s))

    async def _run_until_spec_change(self, work: Coroutine[Any, Any, None]) -> BaseException | None:
        """Run until the work ends or the spec changes; return the error it failed with."""
        tasks = [asyncio.create_task(work), asyncio.create_task(self._wait_for_spec_change())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        error = results[0]
        is_failure = isinstance(error, BaseException)
        return error if is_failure and not isinstance(error, asyncio.CancelledError) else None

    async def _wait_for_spec_change(self) -> None:
        await self._spec_changed.wait()

    async def _run_epoch(self, spec: RuntimeSpec) -> None:
        """Run a controller from one spec until cancelled."""
        deps = self._deps
        tls = None if deps.tls is None else TlsPeer(deps.tls, models_name(spec.ctx.namespace))
        pods = OwnedPods(deps.cache, spec.uid)
        popularity_store = PopularityConfigMap(
            deps.api,
            deps.cache,
            spec.ctx,
            model_digest=spec.model.store.model_digest,
            clock=deps.clock,
        )
        usage_store = ConfigMapUsageStore(deps.api, deps.cache, spec.ctx, clock=deps.clock)
        saved_ledger = usage_store.read()
        self._ledger = saved_ledger if self._ledger is None else self._ledger
        async with (
            KubernetesPlatform(
                deps.api, pods, timing=deps.pod_timing, port=deps.port, tls=tls
            ) as platform,
            SandboxClient(token=spec.token, tls=tls) as client,
            asyncio.TaskGroup() as group,
        ):
            controller = Controller(
                spec.model,
                platform,
                client,
                timing=deps.timing,
                popularity=popularity_store.read()
                if self._popularity is None
                else self._popularity,
                usage_ledger=self._ledger,
                metrics=self._metrics,
                tracer=deps.tracer,
            )
            group.create_task(platform.run())
            await controller.start()
            self.controller, self._platform, self._failure = controller, platform, ""
            try:
                pod_labeler = PodLabeler(deps.api, pods, controller, namespace=spec.ctx.namespace)
                group.create_task(controller.run())
                group.create_task(pod_labeler.run())
                if (policy := resize_policy(spec.ctx)) is not None:
                    resizer = PodResizer(
                        deps.api, pods, controller, policy, namespace=spec.ctx.namespace
                    )
                    group.create_task(resizer.run())
                group.create_task(
                    popularity_store.save_periodically(
                        controller, interval_s=deps.timing.popularity_save_interval_s
                    )
                )
                usage_writer = UsageLedgerWriter(
                    controller.usage_ledger,
                    controller.usage_changed,
                    usage_store,
                    interval_s=deps.timing.usage_save_interval_s,
                )
                group.create_task(usage_writer.run())
                await self._report_changes(controller)
            finally:
                self._popularity = controller.function_stats.popularity_by_stable_key(
                    controller.clock()
                )
                self.controller = self._platform = None

    async def _report_changes(self, controller: Controller) -> None:
        while True:
            revision = controller.revision
            self._report_counts()
            await controller.wait_for_change(revision)
            await asyncio.sleep(REPORT_INTERVAL_S)

    def _report_counts(self) -> None:
        counts = self.counts()
        if counts != self._reported_counts:
            self._reported_counts = counts
            self._on_change()


def _describe_error(error: BaseException) -> str:
    """Return an error in words; the first one of a group."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    with suppress(Exception):
        return f"{type(error).__name__}: {error}"
    return type(error).__name__


class RuntimeManager:
    """The runtimes of all models.

    The reconciler starts and removes them, the control API looks their controllers up.

    Args:
        deps: what all runtimes share.
        on_change: called when the counters of a model have changed, a few times a second at most.
    """

    def __init__(self, deps: RuntimeDependencies, *, on_change: Callable[[ModelKey], None]) -> None:
        self._deps = deps
        self._on_change = on_change
        self._runtimes: dict[ModelKey, ModelRuntime] = {}

    async def ensure(self, ctx: ModelContext) -> None:
        """Start a model's runtime, or restart it if its spec has changed.

        A MoEModel that was deleted and created again under the same name gets a new runtime.

        Raises:
            PlanError: the granularity is invalid; the runtime is unchanged then.
        """
        key = ModelKey(ctx.namespace, ctx.name)
        runtime = self._runtimes.get(key)
        if runtime is not None and runtime.spec.ctx == ctx:
            return
        spec = RuntimeSpec.from_context(ctx)
        if runtime is None:
            self._start(key, spec)
        elif runtime.spec.uid != spec.uid:
            await runtime.stop()
            self._start(key, spec)
        elif runtime.spec != spec:
            logger.info(
                "%s: functions, scaling or pod template changed: restarting its runtime", key
            )
            runtime.restart_with(spec)
        else:
            runtime.spec = spec

    async def remove(self, key: ModelKey, *, delete_sandboxes: bool) -> None:
        """Stop a model's runtime, if it has one.

        Args:
            key: the model.
            delete_sandboxes: whether to delete the sandbox pods. If the MoEModel is deleted too,
                the garbage collector does it.

        Raises:
            KubeApiError: a sandbox pod could not be deleted.
        """
        runtime = self._runtimes.pop(key, None)
        if runtime is None:
            return
        await runtime.stop()
        if delete_sandboxes:
            await gather_limited(
                self._sandbox_pods(runtime), self._delete_pod, limit=MAX_PARALLEL_DELETES
            )

    def find_controller(self, namespace: str, name: str) -> tuple[Controller, str] | None:
        """Return a model's running controller and its token; None if there is none."""
        runtime = self._runtimes.get(ModelKey(namespace, name))
        if runtime is None or runtime.controller is None:
            return None
        return runtime.controller, runtime.spec.token

    def counts(self, key: ModelKey) -> RuntimeCounts | None:
        """Return a model's counters; None if they are not known yet."""
        runtime = self._runtimes.get(key)
        return None if runtime is None else runtime.counts()

    def controllers(self) -> Iterator[tuple[ModelKey, Controller]]:
        """Yield all running controllers, ordered by model."""
        for key in sorted(self._runtimes):
            if (controller := self._runtimes[key].controller) is not None:
                yield key, controller

    async def stop(self) -> None:
        """Stop all runtimes; the sandboxes keep running."""
        runtimes = list(self._runtimes.values())
        self._runtimes.clear()
        await asyncio.gather(*(runtime.stop() for runtime in runtimes))

    def _start(self, key: ModelKey, spec: RuntimeSpec) -> None:
        runtime = ModelRuntime(spec, self._deps, on_change=lambda: self._on_change(key))
        self._runtimes[key] = runtime
        runtime.start()

    def _sandbox_pods(self, runtime: ModelRuntime) -> list[Object]:
        pods = self._deps.cache.owned_by(runtime.spec.uid, POD)
        return [
            pod
            for pod in pods
            if pod["metadata"].get("labels", {}).get(COMPONENT_LABEL) == Component.SANDBOX
            and "deletionTimestamp" not in pod["metadata"]
        ]

    async def _delete_pod(self, pod: Object) -> None:
        metadata = pod["metadata"]
        await self._deps.api.delete(
            POD,
            metadata["namespace"],
            metadata["name"],
            uid=metadata["uid"],
            grace_s=self._deps.pod_timing.grace_s,
        )
