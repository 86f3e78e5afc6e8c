"""Breakdown of a decode step of the router: names of the timers and how they nest."""

from __future__ import annotations

from benchmarks.decoding import DecodeRun

DISPATCH = "timer_whole"  # all of dispatch; contains the timers below
GROUP_PAIRS = "timer_group"
ENCODE = "timer_encode"
FANOUT = "timer_calls"  # contains the following four
WAIT_FOR_SANDBOXES = "timer_wait"
ADD_RESPONSE = "timer_take"  # contains the next one
TO_ROUTER_DEVICE = "timer_back"  # zero if the router is on the CPU, as is TO_HOST
COLOCATED = "timer_here"
FINISH_REDUCTION = "timer_combine"
TO_HOST = "timer_land"
TIMERS = (
    DISPATCH,
    GROUP_PAIRS,
    ENCODE,
    FANOUT,
    WAIT_FOR_SANDBOXES,
    ADD_RESPONSE,
    COLOCATED,
    FINISH_REDUCTION,
    TO_HOST,
    TO_ROUTER_DEVICE,
)
PARTS_OF_DISPATCH = (GROUP_PAIRS, ENCODE, FANOUT, FINISH_REDUCTION, TO_HOST)


def breakdown_ms(run: DecodeRun) -> dict[str, float]:
    """Return the milliseconds per step of each part, then totals.

    The parts before "whole step" add up to it.
    """
    t = run.counters
    parts = {
        "attention, gates, shared experts, head, batching": run.time_s - t[DISPATCH],
        "waiting for the router's device": t[TO_HOST],
        "grouping tokens by function": t[GROUP_PAIRS],
        "encoding frames": t[ENCODE],
        "sending and receiving": t[FANOUT] - t[WAIT_FOR_SANDBOXES] - t[ADD_RESPONSE] - t[COLOCATED],
        "colocated functions": t[COLOCATED],
        "waiting for sandboxes": t[WAIT_FOR_SANDBOXES],
        "decoding and reducing responses": t[ADD_RESPONSE] - t[TO_ROUTER_DEVICE],
        "finishing the reduction": t[FINISH_REDUCTION],
        "copying to the router's device": t[TO_ROUTER_DEVICE],
        "rest of dispatch": t[DISPATCH] - sum(t[name] for name in PARTS_OF_DISPATCH),
    }
    totals = {
        "whole step": run.time_s,
        "CPU of the router": t["cpu_router"],
        "CPU of the sandboxes": t["cpu_others"],
    }
    return {name: s / run.steps * 1e3 for name, s in (parts | totals).items()}
