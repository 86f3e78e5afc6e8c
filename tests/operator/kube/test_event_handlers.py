from kube_objects import make_object

from faasmoe_operator.kube.cache import ObjectCache
from faasmoe_operator.kube.event_handlers import CacheUpdater, ModelEnqueuer
from faasmoe_operator.kube.metrics import OperatorMetrics
from faasmoe_operator.kube.types import JOB, MOEMODEL, POD, Kind, ModelKey, Object

KEY = ModelKey("llm", "moe")
LABELS = {"faasmoe.dev/model": "moe"}


class FakeRelistScheduler:
    """Notes which kinds are doubted."""

    def __init__(self) -> None:
        self.kinds: list[Kind] = []

    def schedule_relist(self, *kinds: Kind) -> None:
        self.kinds += kinds


class FakeReconcileQueue:
    """Notes which models are to be visited."""

    def __init__(self) -> None:
        self.added: list[tuple[ModelKey, bool]] = []

    def add(self, key: ModelKey, *, delay_s: float = 0.0, urgent: bool = False) -> None:
        self.added.append((key, urgent))


class Scenario:
    def __init__(self) -> None:
        self.queue, self.relists, self.cache = (
            FakeReconcileQueue(),
            FakeRelistScheduler(),
            ObjectCache(),
        )
        self.cache.add_event_handler(ModelEnqueuer(self.queue).on_change)
        self.updater = CacheUpdater(self.cache, self.relists, OperatorMetrics())

    def send_event(
        self, kind: Kind, event_type: str | None, obj: Object
    ) -> list[tuple[ModelKey, bool]]:
        """Tell an event; return the visits that it leads to."""
        self.queue.added.clear()
        self.updater.on_event(kind, event_type, obj)
        return list(self.queue.added)


def a_model(generation: int, **status: object) -> Object:
    model = make_object(MOEMODEL, "moe", status=status)
    model["metadata"]["generation"] = generation
    return model


def test_a_model_is_visited_at_once_when_its_spec_changes() -> None:
    story = Scenario()
    assert story.send_event(MOEMODEL, "ADDED", a_model(1)) == [(KEY, True)]
    assert story.send_event(MOEMODEL, "MODIFIED", a_model(2)) == [(KEY, True)]
    assert story.send_event(MOEMODEL, "DELETED", a_model(2)) == [(KEY, True)]


def test_our_own_status_leads_to_no_visit() -> None:
    story = Scenario()
    story.send_event(MOEMODEL, "ADDED", a_model(1))
    assert story.send_event(MOEMODEL, "MODIFIED", a_model(1, url="u")) == []


def test_a_model_that_begins_to_go_is_visited() -> None:
    story = Scenario()
    story.send_event(MOEMODEL, "ADDED", a_model(1))
    going = a_model(1)
    going["metadata"]["deletionTimestamp"] = "2026-09-01T12:00:00Z"
    assert story.send_event(MOEMODEL, "MODIFIED", going) == [(KEY, True)]


def test_what_happens_to_its_objects_leads_to_a_visit() -> None:
    story = Scenario()
    job = make_object(JOB, "moe-store", labels=LABELS)
    assert story.send_event(JOB, "ADDED", job) == [(KEY, False)]
    assert story.send_event(JOB, "DELETED", job) == [(KEY, False)]


def test_what_is_known_or_nobodys_leads_to_none() -> None:
    story = Scenario()
    pod = make_object(POD, "moe-router-1", labels=LABELS)
    story.send_event(POD, "ADDED", pod)
    assert story.send_event(POD, "MODIFIED", pod) == []
    assert story.send_event(POD, "ADDED", make_object(POD, "other")) == []


def test_a_watch_that_begins_anew_is_a_reason_to_doubt() -> None:
    story = Scenario()
    assert not story.updater.has_synced.is_set()
    story.send_event(POD, "ADDED", make_object(POD, "a"))
    assert story.relists.kinds == []
    story.send_event(POD, None, make_object(POD, "b"))
    assert story.relists.kinds == [POD]
    assert story.updater.has_synced.is_set()
