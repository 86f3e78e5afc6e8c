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
    """Notes visits, and ends each as it was told; a test goes on when there were enough."""

    def __init__(self, *ends: ReconcileResult | Exception) -> None:
        self.reconciled: list[ModelKey] = []
        self.n_running = self.max_running = 0
        self._results = list(ends)
        self._called = asyncio.Event()

    async def __call__(self, key: ModelKey) -> ReconcileResult:
        self.n_running += 1
        self.max_running = max(self.n_running, self.max_running)
        await asyncio.sleep(0)
        self.n_running -= 1
        self.reconciled.append(key)
        self._called.set()
        end = self._results.pop(0) if self._results else ReconcileResult(None)
        if isinstance(end, Exception):
            raise end
        return end

    async def wait_for(self, n_visits: int) -> None:
        async with asyncio.timeout(5):
            while len(self.reconciled) < n_visits:
                self._called.clear()
                await self._called.wait()


def run_workers(
    make_reconcile: Callable[[], FakeReconcile],
    scenario: Callable[[WorkerPool, FakeReconcile], Awaitable[None]],
) -> tuple[FakeReconcile, OperatorMetrics]:
    """Run workers while a story is told."""
    metrics = OperatorMetrics()

    async def tell() -> FakeReconcile:
        workers, visits = WorkerPool(metrics=metrics, n_workers=2), make_reconcile()
        task = asyncio.create_task(workers.run(visits))
        try:
            await scenario(workers, visits)
            await asyncio.sleep(0)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        return visits

    return asyncio.run(tell()), metrics


def outcomes(metrics: OperatorMetrics) -> dict[str, float]:
    samples = (s for metric in metrics.reconciles.collect() for s in metric.samples)
    return {s.labels["outcome"]: s.value for s in samples if s.name.endswith("_total")}


def test_visits_several_models_at_the_same_time() -> None:
    async def story(workers: WorkerPool, visits: FakeReconcile) -> None:
        workers.add(A)
        workers.add(B)
        await visits.wait_for(2)

    visits, _ = run_workers(FakeReconcile, story)
    assert sorted(visits.reconciled) == [A, B]
    assert visits.max_running == 2


def test_wakes_for_what_is_due_sooner() -> None:
    async def story(workers: WorkerPool, visits: FakeReconcile) -> None:
        workers.add(A, delay_s=3600)
        await asyncio.sleep(0)
        workers.add(B, delay_s=0.01)
        await visits.wait_for(1)

    visits, _ = run_workers(FakeReconcile, story)
    assert visits.reconciled == [B]


def test_comes_again_when_a_visit_asks_for_it() -> None:
    async def story(workers: WorkerPool, visits: FakeReconcile) -> None:
        workers.add(A)
        await visits.wait_for(2)

    visits, metrics = run_workers(lambda: FakeReconcile(ReconcileResult(0.0)), story)
    assert visits.reconciled == [A, A]
    assert outcomes(metrics)["success"] == 2


def test_backs_off_from_what_is_troubled_refused_or_broken() -> None:
    ends = (
        ReconcileResult(0.0, has_failures=True),
        Forbidden("no", status=403),
        ValueError("a bug"),
    )

    async def story(workers: WorkerPool, visits: FakeReconcile) -> None:
        for n_visits in range(1, len(ends) + 1):
            workers.add(A, urgent=True)
            await visits.wait_for(n_visits)
        workers.add(A)
        await asyncio.sleep(0)

    visits, metrics = run_workers(lambda: FakeReconcile(*ends), story)
    assert len(visits.reconciled) == len(ends)
    assert outcomes(metrics) == {"requeue": 1, "rejected": 1, "error": 1}


def test_leaves_an_api_server_alone_for_as_long_as_it_asks() -> None:
    away = Unavailable("busy", status=429, retry_after_s=3600)

    async def story(workers: WorkerPool, visits: FakeReconcile) -> None:
        workers.add(A)
        await visits.wait_for(1)
        workers.add(A)
        workers.add(B)
        await visits.wait_for(2)

    visits, metrics = run_workers(lambda: FakeReconcile(away), story)
    assert visits.reconciled == [A, B]
    assert outcomes(metrics)["unavailable"] == 1
