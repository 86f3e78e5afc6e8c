"""How often the control does what, and how long it waits."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Timing:
    """Periods and deadlines.

    Attributes:
        tick_s: between two decisions of the autoscalers, as routers report once a second.
        coalesce_s: for finished actions to gather before the next round and table change.
        drain_s: between a function's address leaving the table and its detach, for calls that are
            on their way.
        probe_interval_s: between two inspections of a sandbox.
        start_deadline_s: for a sandbox to become ready.
        adopt_timeout_s: for sandboxes found at the start to tell what they hold: as long as it
            takes to give up one that is silent, for what is not told is attached once more.
        save_interval_s: between two writes of the popularity, at least.
        accounts_interval_s: from a change of the tenants' accounts to its being written.
        read_ahead_interval_s: between two read-aheads while idle.
        tell_interval_s: between two log lines that say what has changed, at least.
    """

    tick_s: float = 1.0
    coalesce_s: float = 0.005
    drain_s: float = 1.0
    probe_interval_s: float = 5.0
    start_deadline_s: float = 60.0
    adopt_timeout_s: float = 15.0
    save_interval_s: float = 30.0
    accounts_interval_s: float = 10.0
    read_ahead_interval_s: float = 60.0
    tell_interval_s: float = 0.5
