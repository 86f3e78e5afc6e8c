from kube_objects import an_object

from faasmoe_operator.kube.cache import ObjectCache
from faasmoe_operator.kube.keys import ModelKey
from faasmoe_operator.kube.kinds import JOB, MOEMODEL, POD, Kind, Object
from faasmoe_operator.kube.metrics import OperatorMetrics
from faasmoe_operator.kube.triggers import Feed, Triggers

KEY = ModelKey("llm", "moe")
LABELS = {"faasmoe.dev/model": "moe"}


class Doubts:
    """Notes which kinds are doubted."""

    def __init__(self) -> None:
        self.kinds: list[Kind] = []

    def doubt(self, *kinds: Kind) -> None:
        self.kinds += kinds


class Visits:
    """Notes which models are to be visited."""

    def __init__(self) -> None:
        self.asked: list[tuple[ModelKey, bool]] = []

    def add(self, key: ModelKey, *, delay_s: float = 0.0, urgent: bool = False) -> None:
        self.asked.append((key, urgent))


class Story:
    def __init__(self) -> None:
        self.visits, self.doubts, self.cache = Visits(), Doubts(), ObjectCache()
        self.cache.subscribe(Triggers(self.visits).take)
        self.feed = Feed(self.cache, self.doubts, OperatorMetrics())

    def tell(self, kind: Kind, type_: str | None, obj: Object) -> list[tuple[ModelKey, bool]]:
        """Tell an event; return the visits that it leads to."""
        self.visits.asked.clear()
        self.feed.take(kind, type_, obj)
        return list(self.visits.asked)


def a_model(generation: int, **status: object) -> Object:
    model = an_object(MOEMODEL, "moe", status=status)
    model["metadata"]["generation"] = generation
    return model


def test_a_model_is_visited_at_once_when_its_spec_changes() -> None:
    story = Story()
    assert story.tell(MOEMODEL, "ADDED", a_model(1)) == [(KEY, True)]
    assert story.tell(MOEMODEL, "MODIFIED", a_model(2)) == [(KEY, True)]
    assert story.tell(MOEMODEL, "DELETED", a_model(2)) == [(KEY, True)]


def test_our_own_status_leads_to_no_visit() -> None:
    story = Story()
    story.tell(MOEMODEL, "ADDED", a_model(1))
    assert story.tell(MOEMODEL, "MODIFIED", a_model(1, url="u")) == []


def test_a_model_that_begins_to_go_is_visited() -> None:
    story = Story()
    story.tell(MOEMODEL, "ADDED", a_model(1))
    going = a_model(1)
    going["metadata"]["deletionTimestamp"] = "2026-09-01T12:00:00Z"
    assert story.tell(MOEMODEL, "MODIFIED", going) == [(KEY, True)]


def test_what_happens_to_its_objects_leads_to_a_visit() -> None:
    story = Story()
    job = an_object(JOB, "moe-store", labels=LABELS)
    assert story.tell(JOB, "ADDED", job) == [(KEY, False)]
    assert story.tell(JOB, "DELETED", job) == [(KEY, False)]


def test_what_is_known_or_nobodys_leads_to_none() -> None:
    story = Story()
    pod = an_object(POD, "moe-router-1", labels=LABELS)
    story.tell(POD, "ADDED", pod)
    assert story.tell(POD, "MODIFIED", pod) == []
    assert story.tell(POD, "ADDED", an_object(POD, "other")) == []


def test_a_watch_that_begins_anew_is_a_reason_to_doubt() -> None:
    story = Story()
    assert not story.feed.has_begun.is_set()
    story.tell(POD, "ADDED", an_object(POD, "a"))
    assert story.doubts.kinds == []
    story.tell(POD, None, an_object(POD, "b"))
    assert story.doubts.kinds == [POD]
    assert story.feed.has_begun.is_set()
