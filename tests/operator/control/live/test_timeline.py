"""The last events of a model."""

from faasmoe_operator.control.live.timeline import MAX_EVENTS, EventKind, Timeline


def test_events_of_a_kind_within_a_second_become_one() -> None:
    timeline = Timeline()
    timeline.add(EventKind.ACTIVATED, count=2, longest_s=0.1, now=1.0)
    timeline.add(EventKind.SANDBOX_STARTED, now=1.2)
    timeline.add(EventKind.ACTIVATED, count=3, longest_s=0.3, now=1.9)
    timeline.add(EventKind.ACTIVATED, longest_s=0.2, now=2.5)
    assert [(e.kind, e.at, e.count, e.longest_s) for e in timeline] == [
        (EventKind.ACTIVATED, 1.0, 5, 0.3),
        (EventKind.SANDBOX_STARTED, 1.2, 1, None),
        (EventKind.ACTIVATED, 2.5, 1, 0.2),
    ]


def test_nothing_is_no_event() -> None:
    timeline = Timeline()
    timeline.add(EventKind.SCALED_TO_ZERO, count=0, now=1)
    timeline.add(EventKind.SCALED_TO_ZERO, count=-2, now=1)
    assert not list(timeline)


def test_old_events_are_dropped() -> None:
    timeline = Timeline()
    for second in range(MAX_EVENTS + 5):
        timeline.add(EventKind.SANDBOX_GONE, now=2.0 * second)
    assert len(list(timeline)) == MAX_EVENTS
    assert next(iter(timeline)).at == 10
