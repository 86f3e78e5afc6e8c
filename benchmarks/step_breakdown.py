"""The parts of a decode step on our side: their timers' names, and how they add up."""

from __future__ import annotations

from benchmarks.decoding import DecodeRun

DISPATCH = "timer_whole"  # all of dispatch; what follows is inside it
GROUP_PAIRS = "timer_group"
ENCODE = "timer_encode"
FANOUT = "timer_calls"  # the four that follow are inside it
WAIT_FOR_SANDBOXES = "timer_wait"
ADD_RESPONSE = "timer_take"  # the next one is inside it
TO_ROUTER_DEVICE = "timer_back"  # none where the router is on the CPU, as with land
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
    """Return where a step's milliseconds went, in parts that add up to the whole step."""
    t = run.counters
    parts = {
        "attention, gates, shared experts, head, batching": run.time_s - t[DISPATCH],
        "waiting for the router's device": t[TO_HOST],
        "grouping tokens by function": t[GROUP_PAIRS],
        "encoding frames": t[ENCODE],
        "sending and receiving": t[FANOUT] - t[WAIT_FOR_SANDBOXES] - t[ADD_RESPONSE] - t[COLOCATED],
        "colocated functions": t[COLOCATED],
        "waiting for sandboxes": t[WAIT_FOR_SANDBOXES],
        "decoding and adding answers": t[ADD_RESPONSE] - t[TO_ROUTER_DEVICE],
        "ending the sum": t[FINISH_REDUCTION],
        "copying to the router's device": t[TO_ROUTER_DEVICE],
        "rest of dispatch": t[DISPATCH] - sum(t[name] for name in PARTS_OF_DISPATCH),
    }
    totals = {
        "whole step": run.time_s,
        "CPU of the router": t["cpu_router"],
        "CPU of the sandboxes": t["cpu_others"],
    }
    return {name: s / run.steps * 1e3 for name, s in (parts | totals).items()}
