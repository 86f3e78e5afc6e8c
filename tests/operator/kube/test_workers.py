import asyncio
from collections.abc import Awaitable, Callable

from faasmoe_operator.kube.errors import Forbidden, Unavailable
from faasmoe_operator.kube.keys import ModelKey
from faasmoe_operator.kube.metrics import OperatorMetrics
from faasmoe_operator.kube.reconciler import Visit
from faasmoe_operator.kube.workers import Workers

A, B = ModelKey("llm", "a"), ModelKey("llm", "b")
Story = Callable[[Workers], Awaitable[None]]


class Visitor:
    """Notes visits, and ends each as it was told; a test goes on when there were enough."""

    def __init__(self, *ends: Visit | Exception) -> None:
        self.visited: list[ModelKey] = []
        self.at_once = self.most_at_once = 0
        self._ends = list(ends)
        self._came = asyncio.Event()

    async def __call__(self, key: ModelKey) -> Visit:
        self.at_once += 1
        self.most_at_once = max(self.at_once, self.most_at_once)
        await asyncio.sleep(0)
        self.at_once -= 1
        self.visited.append(key)
        self._came.set()
        end = self._ends.pop(0) if self._ends else Visit(None)
        if isinstance(end, Exception):
            raise end
        return end

    async def until(self, n_visits: int) -> None:
        async with asyncio.timeout(5):
            while len(self.visited) < n_visits:
                self._came.clear()
                await self._came.wait()


def run(
    visitor: Callable[[], Visitor], story: Callable[[Workers, Visitor], Awaitable[None]]
) -> tuple[Visitor, OperatorMetrics]:
    """Run workers while a story is told."""
    metrics = OperatorMetrics()

    async def tell() -> Visitor:
        workers, visits = Workers(metrics=metrics, n_workers=2), visitor()
        task = asyncio.create_task(workers.run(visits))
        try:
            await story(workers, visits)
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
    async def story(workers: Workers, visits: Visitor) -> None:
        workers.add(A)
        workers.add(B)
        await visits.until(2)

    visits, _ = run(Visitor, story)
    assert sorted(visits.visited) == [A, B]
    assert visits.most_at_once == 2


def test_wakes_for_what_is_due_sooner() -> None:
    async def story(workers: Workers, visits: Visitor) -> None:
        workers.add(A, delay_s=3600)
        await asyncio.sleep(0)
        workers.add(B, delay_s=0.01)
        await visits.until(1)

    visits, _ = run(Visitor, story)
    assert visits.visited == [B]


def test_comes_again_when_a_visit_asks_for_it() -> None:
    async def story(workers: Workers, visits: Visitor) -> None:
        workers.add(A)
        await visits.until(2)

    visits, metrics = run(lambda: Visitor(Visit(0.0)), story)
    assert visits.visited == [A, A]
    assert outcomes(metrics)["settled"] == 2


def test_backs_off_from_what_is_troubled_refused_or_broken() -> None:
    ends = (Visit(0.0, is_troubled=True), Forbidden("no", status=403), ValueError("a bug"))

    async def story(workers: Workers, visits: Visitor) -> None:
        for n_visits in range(1, len(ends) + 1):
            workers.add(A, urgent=True)
            await visits.until(n_visits)
        workers.add(A)
        await asyncio.sleep(0)

    visits, metrics = run(lambda: Visitor(*ends), story)
    assert len(visits.visited) == len(ends)
    assert outcomes(metrics) == {"troubled": 1, "refused": 1, "error": 1}


def test_leaves_an_api_server_alone_for_as_long_as_it_asks() -> None:
    away = Unavailable("busy", status=429, retry_after_s=3600)

    async def story(workers: Workers, visits: Visitor) -> None:
        workers.add(A)
        await visits.until(1)
        workers.add(A)
        workers.add(B)
        await visits.until(2)

    visits, metrics = run(lambda: Visitor(away), story)
    assert visits.visited == [A, B]
    assert outcomes(metrics)["unavailable"] == 1
