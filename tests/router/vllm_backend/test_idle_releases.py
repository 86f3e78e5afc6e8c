"""When an idle engine frees memory."""

from faasmoe_router.vllm_backend.idle_releases import IdleMemory, IdleReleases

NEVER = float("-inf")
BOTH = {IdleMemory.CALLS, IdleMemory.CACHE}


def test_nothing_is_freed_before_the_first_request() -> None:
    assert not IdleReleases(calls_idle_s=10, cache_idle_s=60).due(100, NEVER)


def test_each_kind_is_freed_once_after_its_delay() -> None:
    releases = IdleReleases(calls_idle_s=10, cache_idle_s=60)
    due = {now_s: releases.due(now_s, 100) for now_s in (105, 111, 112, 160, 161, 162)}
    assert {now_s: kinds for now_s, kinds in due.items() if kinds} == {
        111: {IdleMemory.CALLS},
        161: {IdleMemory.CACHE},
    }


def test_further_work_makes_both_due_again() -> None:
    releases = IdleReleases(calls_idle_s=10, cache_idle_s=60)
    releases.due(200, 100)
    assert not releases.due(230, 225)
    assert releases.due(286, 225) == BOTH
