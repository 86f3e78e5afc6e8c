import asyncio
from collections.abc import Awaitable, Callable

from faasmoe_operator.kube.errors import Forbidden, Unavailable
from faasmoe_operator.kube.metrics import OperatorMetrics
from faasmoe_operator.kube.reconciler import ReconcileResult
from faasmoe_operator.kube.types import ModelKey
from faasmoe_operator.kube.work_queue import WorkerPool

A, B = ModelKey("llm", "a"), ModelKey("llm", "b")
Scenario = Callable[[WorkerPool], Awaitable[None]]


class FakeReconcile:
    """Records reconciles and returns or raises the given results in turn."""

    def __init__(self, *results: ReconcileResult | Exception) -> None:
        self.reconciled: list[ModelKey] = []
        self.n_running = self.max_running = 0
        self._results = list(results)
        self._called = asyncio.Event()

    async def __call__(self, key: ModelKey) -> ReconcileResult:
        self.n_running += 1
        self.max_running = max(self.n_running, self.max_running)
        await asyncio.sleep(0)
        self.n_running -= 1
        self.reconciled.append(key)
        self._called.set()
        result = self._results.pop(0) if self._results else ReconcileResult(None)
        if isinstance(result, Exception):
            raise result
        return result

    async def wait_for(self, n_calls: int) -> None:
        async with asyncio.timeout(120):
            while len(self.reconciled) < n_calls:
                self._called.clear()
                await self._called.wait()


def run_workers(
    make_reconcile: Callable[[], FakeReconcile],
    scenario: Callable[[WorkerPool, FakeReconcile], Awaitable[None]],
) -> tuple[FakeReconcile, OperatorMetrics]:
    """Run workers during a scenario."""
    metrics = OperatorMetrics()

    async def run_scenario() -> FakeReconcile:
        workers, reconcile = WorkerPool(metrics=metrics, n_workers=2), make_reconcile()
        task = asyncio.create_task(workers.run(reconcile))
        try:
            await scenario(workers, reconcile)
            await asyncio.sleep(0)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        return reconcile

    return asyncio.run(run_scenario()), metrics


def outcomes(metrics: OperatorMetrics) -> dict[str, float]:
    samples = (s for metric in metrics.reconciles.collect() for s in metric.samples)
    return {s.labels["outcome"]: s.value for s in samples if s.name.endswith("_total") and s.value}


def test_workers_reconcile_several_models_concurrently() -> None:
    async def scenario(workers: WorkerPool, reconcile: FakeReconcile) -> None:
        workers.add(A)
        workers.add(B)
        await reconcile.wait_for(2)

    reconcile, _ = run_workers(FakeReconcile, scenario)
    assert sorted(reconcile.reconciled) == [A, B]
    assert reconcile.max_running == 2


def test_wakes_up_for_a_key_that_is_due_sooner() -> None:
    async def scenario(workers: WorkerPool, reconcile: FakeReconcile) -> None:
        workers.add(A, delay_s=3600)
        await asyncio.sleep(0)
        workers.add(B, delay_s=0.01)
        await reconcile.wait_for(1)

    reconcile, _ = run_workers(FakeReconcile, scenario)
    assert reconcile.reconciled == [B]


def test_requeues_when_a_reconcile_requests_it() -> None:
    async def scenario(workers: WorkerPool, reconcile: FakeReconcile) -> None:
        workers.add(A)
        await reconcile.wait_for(2)

    reconcile, metrics = run_workers(lambda: FakeReconcile(ReconcileResult(0.0)), scenario)
    assert reconcile.reconciled == [A, A]
    assert outcomes(metrics)["success"] == 2


def test_backs_off_after_failures_rejections_and_exceptions() -> None:
    results = (
        ReconcileResult(0.0, has_failures=True),
        Forbidden("no", status=403),
        ValueError("a bug"),
    )

    async def scenario(workers: WorkerPool, reconcile: FakeReconcile) -> None:
        for n_calls in range(1, len(results) + 1):
            workers.add(A, urgent=True)
            await reconcile.wait_for(n_calls)
        workers.add(A)
        await asyncio.sleep(0)

    reconcile, metrics = run_workers(lambda: FakeReconcile(*results), scenario)
    assert len(reconcile.reconciled) == len(results)
    assert outcomes(metrics) == {"requeue": 1, "rejected": 1, "error": 1}


def test_honours_retry_after_of_the_api_server() -> None:
    throttled = Unavailable("busy", status=429, retry_after_s=3600)

    async def scenario(workers: WorkerPool, reconcile: FakeReconcile) -> None:
        workers.add(A)
        await reconcile.wait_for(1)
        workers.add(A)
        workers.add(B)
        await reconcile.wait_for(2)

    reconcile, metrics = run_workers(lambda: FakeReconcile(throttled), scenario)
    assert reconcile.reconciled == [A, B]
    assert outcomes(metrics)["unavailable"] == 1
