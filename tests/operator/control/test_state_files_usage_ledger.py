"""The usage ledger on disk: written when it changes, replaced as a whole, never thrown away."""

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from fake_platform import eventually

from faasmoe_contracts.usage import UsageRecord, UsageReport
from faasmoe_operator.aio import ChangeNotifier
from faasmoe_operator.control.state_files import FileUsageStore, usage_ledger_path
from faasmoe_operator.control.usage_ledger import UsageLedger, UsageLedgerWriter

USAGE_ROWS = {"acme": [1, 2, 3, 0, 0, 0, 0.5, 0.25]}
FOREVER_S = 3600.0


def usage_report(n_tokens: int, *, is_final: bool = False) -> UsageReport:
    return UsageReport("a" * 32, 100.0, {"acme": UsageRecord(n_tokens)}, is_final=is_final)


def test_is_beside_the_store_and_not_in_it(tmp_path: Path) -> None:
    assert usage_ledger_path(tmp_path / "store") == tmp_path / "store.state" / "accounts.json"


def test_is_read_as_it_was_written(tmp_path: Path) -> None:
    store = FileUsageStore(tmp_path / "state" / "accounts.json")
    assert store.read().usage_by_tenant == {}
    ledger = UsageLedger(12.5)
    ledger.add_report(usage_report(7))
    assert asyncio.run(store.write(ledger))
    assert store.read().last_reported == ledger.last_reported
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["accounts.json"]


def ledger_text(**changes: Any) -> str:
    fields = [
        *("prompt_tokens", "generated_tokens", "completed", "cancelled", "failed", "limited"),
        *("expert_seconds", "expert_gb_seconds"),
    ]
    value = {"version": 1, "since_s": 1.0, "fields": fields, "accounts": USAGE_ROWS, "books": {}}
    return json.dumps({**value, **changes})


def test_the_unchanged_ledger_text_is_valid(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(ledger_text())
    assert FileUsageStore(tmp_path / "a.json").read().usage_by_tenant["acme"] == UsageRecord(
        1, 2, 3, expert_seconds=0.5, expert_gb_seconds=0.25
    )


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param("{", id="cut-off"),
        pytest.param("[]", id="no-object"),
        pytest.param("\x00", id="binary"),
        pytest.param("[" * 100_000, id="nested"),
        pytest.param(ledger_text(version=2), id="version"),
        pytest.param(ledger_text(fields=["prompt_tokens"]), id="fields"),
        pytest.param(ledger_text(since_s="then"), id="time-in-words"),
        pytest.param(ledger_text(accounts=[1]), id="accounts-in-a-list"),
        pytest.param(ledger_text(accounts={"acme": [1, 2]}), id="short-row"),
        pytest.param(ledger_text(accounts={"acme": [-1, *USAGE_ROWS["acme"][1:]]}), id="negative"),
        pytest.param(ledger_text(books={"a": {"acme": [float("nan")] * 8}}), id="nan"),
    ],
)
def test_a_damaged_file_is_quarantined(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    path = tmp_path / "accounts.json"
    path.write_text(text)
    assert FileUsageStore(path).read().usage_by_tenant == {}
    assert (tmp_path / "accounts.damaged").read_text() == text
    assert str(path) in caplog.text


def test_a_failed_write_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "state").write_text("")
    with caplog.at_level(logging.ERROR):
        assert not asyncio.run(
            FileUsageStore(tmp_path / "state" / "a.json").write(UsageLedger(0.0))
        )
    assert "cannot be saved" in caplog.text


class FakeUsageStore:
    """Records the prompt tokens of each written ledger; fails the first writes."""

    def __init__(self, n_failures: int = 0) -> None:
        self.written: list[int] = []
        self.n_failures = n_failures

    def read(self) -> UsageLedger:
        return UsageLedger(0.0)

    async def write(self, ledger: UsageLedger) -> bool:
        if self.n_failures:
            self.n_failures -= 1
            return False
        self.written.append(ledger.usage_by_tenant["acme"].prompt_tokens)
        return True


def test_is_written_after_the_interval_after_a_final_report_and_at_the_end() -> None:
    async def scenario() -> None:
        ledger, changed, store = UsageLedger(0.0), ChangeNotifier(), FakeUsageStore()

        def report(n_tokens: int, *, is_final: bool = False) -> None:
            ledger.add_report(usage_report(n_tokens, is_final=is_final))
            changed.notify()

        writing = asyncio.create_task(
            UsageLedgerWriter(ledger, changed, store, interval_s=0.01).run()
        )
        report(1)
        await eventually(lambda: store.written == [1])
        report(1)  # unchanged
        report(2)
        await eventually(lambda: store.written == [1, 2])
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)

        writing = asyncio.create_task(
            UsageLedgerWriter(ledger, changed, store, interval_s=FOREVER_S).run()
        )
        report(3)
        report(4, is_final=True)
        await eventually(lambda: store.written == [1, 2, 4])
        report(5)
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        assert store.written == [1, 2, 4, 5]

    asyncio.run(scenario())


def test_a_failed_write_is_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("faasmoe_operator.control.usage_ledger.RETRY_S", 0.001)

    async def scenario() -> None:
        ledger, changed, store = UsageLedger(0.0), ChangeNotifier(), FakeUsageStore(n_failures=3)
        writer = UsageLedgerWriter(ledger, changed, store, interval_s=0.001)
        writing = asyncio.create_task(writer.run())
        ledger.add_report(usage_report(1))
        changed.notify()
        await eventually(lambda: store.written == [1])
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)

    asyncio.run(scenario())
