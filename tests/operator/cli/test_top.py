from typing import Any

from faasmoe_operator.cli.top import render_status


def function(name: str, **changes: Any) -> dict[str, Any]:
    return {
        "id": name,
        "layers": [0],
        "n_experts": 3,
        "size_bytes": 1 << 20,
        "state": "Active",
        "desired": 1,
        "ready": 1,
        "concurrency": 0.5,
        "idle_s": 2.4,
        "calls": 7,
        "rows": 70,
        **changes,
    }


STATUS: dict[str, Any] = {
    "model": "tiny",
    "followers": 1,
    "functions": [
        function("quiet", rows=0, calls=0, ready=0, desired=0, state="Inactive", idle_s=None),
        function("busy", rows=99, desired=2, layers=[0, 1, 2]),
        function("silent", rows=5, concurrency=None),
    ],
    "sandboxes": [
        {"state": "Ready", "functions": ["busy", "silent"], "models": 1, "pss_bytes": 4 << 20},
        {"state": "Starting", "functions": [], "models": 1, "pss_bytes": None},
    ],
    "pool": {"size": 1, "ready": 0},
    "held": 3,
    "decisions": {"Activated": 2, "NoTraffic": 1},
}


def rendered_lines(max_lines: int) -> list[str]:
    return [
        " ".join(line.split()) for line in render_status(STATUS, max_lines=max_lines).splitlines()
    ]


def test_shows_totals() -> None:
    assert rendered_lines(10)[:3] == [
        "tiny: 3 functions (2 Active, 1 Inactive), 2 replicas, 2.0 MiB of active weights",
        "sandboxes: 2 (1 Ready, 1 Starting), 4.0 MiB; generic: 0, pool of 1",
        "routers: 1; queued calls and requests: 3; decisions: Activated 2, NoTraffic 1",
    ]


def test_counts_sandboxes_that_are_shared_with_other_models() -> None:
    shared = [{**sandbox, "models": 3} for sandbox in STATUS["sandboxes"][:1]]
    lines = render_status({**STATUS, "sandboxes": shared}, max_lines=10).splitlines()
    assert lines[1] == (
        "sandboxes: 1 (1 Ready), 4.0 MiB; 1 shared with other models; generic: 0, pool of 1"
    )


def test_orders_functions_by_rows_and_shows_memory_share() -> None:
    assert rendered_lines(10)[5:] == [
        "busy 0-2 3 Active 1/2 0.50 7 99 2 s 1.0 MiB 2.0 MiB",
        "silent 0 3 Active 1/1 - 7 5 2 s 1.0 MiB 2.0 MiB",
        "quiet 0 3 Inactive 0/0 0.50 0 0 - 1.0 MiB -",
    ]


def test_truncates_to_max_lines() -> None:
    assert rendered_lines(1)[5:] == [
        "busy 0-2 3 Active 1/2 0.50 7 99 2 s 1.0 MiB 2.0 MiB",
        "and 2 more functions",
    ]
