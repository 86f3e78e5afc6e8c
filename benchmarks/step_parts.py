"""The parts of a decode step on our side: their timers' names, and how they add up."""

from __future__ import annotations

from benchmarks.decoding import Run

WHOLE = "timer_whole"  # all of dispatch; what follows is inside it
GROUP = "timer_group"
ENCODE = "timer_encode"
CALLS = "timer_calls"  # the four that follow are inside it
WAIT = "timer_wait"
TAKE = "timer_take"  # the next one is inside it
BACK = "timer_back"  # none where the router is on the CPU, as with land
HERE = "timer_here"
COMBINE = "timer_combine"
LAND = "timer_land"
TIMERS = (WHOLE, GROUP, ENCODE, CALLS, WAIT, TAKE, HERE, COMBINE, LAND, BACK)
PARTS_OF_WHOLE = (GROUP, ENCODE, CALLS, COMBINE, LAND)


def breakdown_ms(run: Run) -> dict[str, float]:
    """Return where a step's milliseconds went, in parts that add up to the whole step."""
    t = run.counters
    parts = {
        "attention, gates, shared experts, head, batching": run.time_s - t[WHOLE],
        "waiting for the router's device": t[LAND],
        "grouping tokens by function": t[GROUP],
        "encoding frames": t[ENCODE],
        "sending and receiving": t[CALLS] - t[WAIT] - t[TAKE] - t[HERE],
        "hot functions": t[HERE],
        "waiting for sandboxes": t[WAIT],
        "decoding and adding answers": t[TAKE] - t[BACK],
        "ending the sum": t[COMBINE],
        "copying to the router's device": t[BACK],
        "rest of dispatch": t[WHOLE] - sum(t[name] for name in PARTS_OF_WHOLE),
    }
    used = {
        "whole step": run.time_s,
        "CPU of the router": t["cpu_router"],
        "CPU of the sandboxes": t["cpu_others"],
    }
    return {name: s / run.steps * 1e3 for name, s in (parts | used).items()}
