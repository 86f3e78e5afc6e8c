"""The usage of requests that ended shortly before a router was killed."""

import asyncio
import logging
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faasmoe_router.tenants.usage_journal import RequestUsage, journal_path
from faasmoe_router.tenants.usage_store import (
    MAX_RECENT_REQUESTS,
    ClusterUsage,
    UsageFileStore,
)

REQUEST = RequestUsage("acme", 3, 4, "completed")
STEPS = st.lists(st.sampled_from(("record", "save", "kill", "fail to save")), max_size=30)


def start(folder: Path) -> ClusterUsage:
    store = UsageFileStore(folder)
    return ClusterUsage(store.load(), store)


def completed(usage: ClusterUsage) -> tuple[int, int, int]:
    total = usage.cluster_total("acme")
    return total.completed, total.prompt_tokens, total.generated_tokens


def test_a_killed_router_loses_no_request_that_has_ended(tmp_path: Path) -> None:
    usage = start(tmp_path)
    usage.record(REQUEST)
    asyncio.run(usage.save())
    usage.record(REQUEST)
    usage.record(RequestUsage("beta", 1, 0, "failed"))
    assert completed(start(tmp_path)) == (2, 6, 8)
    assert start(tmp_path).cluster_total("beta").failed == 1


def test_a_request_that_is_repeated_after_a_kill_counts_once(tmp_path: Path) -> None:
    usage = start(tmp_path)
    request = RequestUsage("acme", 3, 4, "completed", "an-id")
    usage.record(request)
    usage = start(tmp_path)  # killed before the response was sent
    usage.record(request)
    asyncio.run(usage.save())  # removes the journal
    usage = start(tmp_path)
    usage.record(request)
    usage.record(REQUEST)  # which has no id
    usage.record(REQUEST)
    assert completed(start(tmp_path)) == (3, 9, 12)


def test_requests_are_remembered_for_a_while(tmp_path: Path) -> None:
    usage = start(tmp_path)
    for number in range(MAX_RECENT_REQUESTS + 1):
        usage.record(RequestUsage("acme", 1, 1, "completed", f"id-{number}"))
    store = UsageFileStore(tmp_path)
    store.load()
    assert not store.is_counted("id-0")
    assert store.is_counted("id-1")
    assert not store.is_counted("")


@given(STEPS)
def test_every_request_counts_once_whatever_happens(steps: list[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, n = Path(name), 0
        usage = start(folder)
        for step in steps:
            if step == "record":
                usage.record(REQUEST)
                n += 1
            elif step == "save":
                asyncio.run(usage.save())
            elif step == "kill":
                usage = start(folder)
            else:
                (folder / "usage.new").mkdir()  # where the file is written first
                asyncio.run(usage.save())
                (folder / "usage.new").rmdir()
        assert completed(start(folder)) == (n, 3 * n, 4 * n)


def test_journals_are_removed_once_the_file_contains_them(tmp_path: Path) -> None:
    usage = start(tmp_path)
    for _ in range(3):
        usage.record(REQUEST)
        asyncio.run(usage.save())
    assert [path.name for path in tmp_path.iterdir()] == ["usage.json"]


def test_a_line_that_was_cut_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    usage = start(tmp_path)
    usage.record(REQUEST)
    with journal_path(tmp_path, 0).open("ab") as file:
        file.write(b'{"tenant": "ac')
    with caplog.at_level(logging.ERROR):
        assert completed(start(tmp_path)) == (1, 3, 4)
    assert "left out" in caplog.text


def test_a_journal_that_cannot_be_written_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    usage = start(tmp_path / "state")
    (tmp_path / "state").rmdir()
    with caplog.at_level(logging.ERROR):
        usage.record(REQUEST)
        usage.record(REQUEST)
    assert caplog.text.count("cannot be written at once") == 1
    assert completed(usage) == (2, 6, 8)
