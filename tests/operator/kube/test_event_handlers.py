from kube_objects import make_object

from faasmoe_operator.kube.cache import ObjectCache
from faasmoe_operator.kube.event_handlers import ModelEnqueuer
from faasmoe_operator.kube.types import JOB, MOEMODEL, POD, ModelKey, Object

KEY = ModelKey("llm", "moe")
LABELS = {"faasmoe.dev/model": "moe"}


class FakeReconcileQueue:
    """Records which models are enqueued, and whether urgently."""

    def __init__(self) -> None:
        self.added: list[tuple[ModelKey, bool]] = []

    def add(self, key: ModelKey, *, delay_s: float = 0.0, urgent: bool = False) -> None:
        self.added.append((key, urgent))

    def take(self) -> list[tuple[ModelKey, bool]]:
        """Return what was enqueued since the last call."""
        added, self.added = self.added, []
        return added


def cache_and_queue() -> tuple[ObjectCache, FakeReconcileQueue]:
    cache, queue = ObjectCache(), FakeReconcileQueue()
    cache.add_event_handler(ModelEnqueuer(queue).on_change)
    return cache, queue


def make_model(generation: int, **status: object) -> Object:
    model = make_object(MOEMODEL, "moe", status=status)
    model["metadata"]["generation"] = generation
    return model


def test_a_model_is_enqueued_urgently_when_it_appears_changes_or_goes() -> None:
    cache, queue = cache_and_queue()
    cache.update(MOEMODEL, make_model(1))
    assert queue.take() == [(KEY, True)]
    cache.update(MOEMODEL, make_model(2))
    assert queue.take() == [(KEY, True)]
    cache.delete(MOEMODEL, make_model(2))
    assert queue.take() == [(KEY, True)]


def test_a_status_update_enqueues_nothing() -> None:
    cache, queue = cache_and_queue()
    cache.update(MOEMODEL, make_model(1))
    queue.take()
    cache.update(MOEMODEL, make_model(1, url="u"))
    assert queue.take() == []


def test_a_terminating_model_is_enqueued() -> None:
    cache, queue = cache_and_queue()
    cache.update(MOEMODEL, make_model(1))
    queue.take()
    terminating = make_model(1)
    terminating["metadata"]["deletionTimestamp"] = "2026-09-01T12:00:00Z"
    cache.update(MOEMODEL, terminating)
    assert queue.take() == [(KEY, True)]


def test_a_change_of_an_owned_object_enqueues_its_model() -> None:
    cache, queue = cache_and_queue()
    job = make_object(JOB, "moe-store", labels=LABELS)
    cache.update(JOB, job)
    assert queue.take() == [(KEY, False)]
    cache.delete(JOB, job)
    assert queue.take() == [(KEY, False)]


def test_known_states_and_unlabelled_objects_enqueue_nothing() -> None:
    cache, queue = cache_and_queue()
    pod = make_object(POD, "moe-router-1", labels=LABELS)
    cache.update(POD, pod)
    queue.take()
    cache.update(POD, pod)
    cache.update(POD, make_object(POD, "other"))
    assert queue.take() == []
