"""When a control core may rest: nothing is under way, and no decision would change anything. Pure.

A model that nobody calls costs nothing then: no decisions, no plans. Whatever happens to it (a
wake, load, a sandbox that changes, the end of an action) rouses its core.
"""

from __future__ import annotations

from faasmoe_operator.control.actuator import Actuator
from faasmoe_operator.control.fleet import Fleet
from faasmoe_operator.control.records import Records
from faasmoe_operator.control.reports import Reports
from faasmoe_operator.control.scalers import Scalers


def rests_until(
    now: float,
    *,
    fleet: Fleet,
    scalers: Scalers,
    reports: Reports,
    records: Records,
    actuator: Actuator,
    start_deadline_s: float,
) -> float | None:
    """Return until when nothing is to be done unless something happens; None if something is.

    Args:
        now: the time.
        fleet: the sandboxes.
        scalers: the autoscalers.
        reports: what routers said.
        records: wakes that wait.
        actuator: actions under way.
        start_deadline_s: how long a sandbox may take to become ready.
    """
    if fleet.is_in_motion or records.waiting() or reports.is_busy(now):
        return None
    if not scalers.are_at_rest(fleet.ready(), now=now):
        return None
    return min(fleet.starting_since() + start_deadline_s, actuator.may_create_at(now))
