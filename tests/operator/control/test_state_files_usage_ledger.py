"""The tenants' accounts on disk: written when they change, whole, and never thrown away."""

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from fake_platform import eventually

from faasmoe_operator.control.state_files import UsageLedgerFile, usage_ledger_path
from faasmoe_operator.control.usage_ledger import (
    TenantUsage,
    UsageLedger,
    UsageLedgerWriter,
    UsageReport,
)
from faasmoe_operator.platforms.registry import ChangeNotifier

USAGE_ROWS = {"acme": [1, 2, 3, 0, 0, 0, 0.5, 0.25]}
FOREVER_S = 3600.0


def usage_report(n_tokens: int, *, is_final: bool = False) -> UsageReport:
    return UsageReport("a" * 32, 100.0, {"acme": TenantUsage(n_tokens)}, is_final=is_final)


def test_lies_beside_the_store_and_not_in_it(tmp_path: Path) -> None:
    assert usage_ledger_path(tmp_path / "store") == tmp_path / "store.state" / "accounts.json"


def test_is_read_as_it_was_written(tmp_path: Path) -> None:
    file = UsageLedgerFile(tmp_path / "state" / "accounts.json")
    assert file.read().usage_by_tenant == {}
    ledger = UsageLedger(12.5)
    ledger.add_report(usage_report(7))
    assert asyncio.run(file.write(ledger))
    assert file.read().last_reported == ledger.last_reported
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["accounts.json"]


def damaged(**changes: Any) -> str:
    fields = [
        *("prompt_tokens", "generated_tokens", "completed", "cancelled", "failed", "limited"),
        *("expert_seconds", "expert_gb_seconds"),
    ]
    value = {"version": 1, "since_s": 1.0, "fields": fields, "accounts": USAGE_ROWS, "books": {}}
    return json.dumps({**value, **changes})


def test_the_text_that_is_damaged_below_is_right_before(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(damaged())
    assert UsageLedgerFile(tmp_path / "a.json").read().usage_by_tenant["acme"] == TenantUsage(
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
        pytest.param(damaged(version=2), id="version"),
        pytest.param(damaged(fields=["prompt_tokens"]), id="fields"),
        pytest.param(damaged(since_s="then"), id="time-in-words"),
        pytest.param(damaged(accounts=[1]), id="accounts-in-a-list"),
        pytest.param(damaged(accounts={"acme": [1, 2]}), id="short-row"),
        pytest.param(damaged(accounts={"acme": [-1, *USAGE_ROWS["acme"][1:]]}), id="negative"),
        pytest.param(damaged(books={"a": {"acme": [float("nan")] * 8}}), id="nan"),
    ],
)
def test_a_damaged_file_is_put_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    path = tmp_path / "accounts.json"
    path.write_text(text)
    assert UsageLedgerFile(path).read().usage_by_tenant == {}
    assert (tmp_path / "accounts.damaged").read_text() == text
    assert str(path) in caplog.text


def test_a_folder_that_cannot_be_written_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "state").write_text("")
    with caplog.at_level(logging.ERROR):
        assert not asyncio.run(
            UsageLedgerFile(tmp_path / "state" / "a.json").write(UsageLedger(0.0))
        )
    assert "cannot be saved" in caplog.text


class FakeWriter:
    """Keeps what is written; refuses as often as it is told to."""

    def __init__(self, n_refusals: int = 0) -> None:
        self.texts: list[int] = []
        self.n_refusals = n_refusals

    async def __call__(self, ledger: UsageLedger) -> bool:
        if self.n_refusals:
            self.n_refusals -= 1
            return False
        self.texts.append(ledger.usage_by_tenant["acme"].prompt_tokens)
        return True


def test_is_written_after_a_while_at_an_ending_at_once_and_at_the_end() -> None:
    async def story() -> None:
        ledger, changed, writes = UsageLedger(0.0), ChangeNotifier(), FakeWriter()

        def tell(n_tokens: int, *, ends: bool = False) -> None:
            ledger.add_report(usage_report(n_tokens, is_final=ends))
            changed.notify()

        keeping = asyncio.create_task(
            UsageLedgerWriter(ledger, changed, writes, interval_s=0.01).run()
        )
        tell(1)
        await eventually(lambda: writes.texts == [1])
        tell(1)  # nothing new
        tell(2)
        await eventually(lambda: writes.texts == [1, 2])
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)

        keeping = asyncio.create_task(
            UsageLedgerWriter(ledger, changed, writes, interval_s=FOREVER_S).run()
        )
        tell(3)
        tell(4, ends=True)
        await eventually(lambda: writes.texts == [1, 2, 4])
        tell(5)
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        assert writes.texts == [1, 2, 4, 5]

    asyncio.run(story())


def test_a_write_that_fails_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("faasmoe_operator.control.usage_ledger.RETRY_S", 0.001)

    async def story() -> None:
        ledger, changed, writes = UsageLedger(0.0), ChangeNotifier(), FakeWriter(n_refusals=3)
        ledger_keeper = UsageLedgerWriter(ledger, changed, writes, interval_s=0.001)
        keeping = asyncio.create_task(ledger_keeper.run())
        ledger.add_report(usage_report(1))
        changed.notify()
        await eventually(lambda: writes.texts == [1])
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)

    asyncio.run(story())
