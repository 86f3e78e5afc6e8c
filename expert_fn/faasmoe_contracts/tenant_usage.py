"""What tenants have used, by day and model; the file that the gateway keeps and commands read.

Days are in UTC.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

Period = Literal["day", "month"]
Unit = Literal["inputTokens", "outputTokens", "money"]
USAGE_FILE_NAME = "tenant-usage.json"
_FURTHER_FILES = "tenant-usage-*.json"
PERIODS: tuple[Period, ...] = ("day", "month")


def usage_file(folder: Path, index: int) -> Path:
    """Return the file of a gateway's usage; those of several gateways add up."""
    stem, _, suffix = USAGE_FILE_NAME.partition(".")
    return folder / (f"{stem}-{index}.{suffix}" if index else USAGE_FILE_NAME)


def usage_files(folder: Path) -> list[Path]:
    """Return the files of all gateways' usage that exist."""
    first = folder / USAGE_FILE_NAME
    return [*([first] if first.is_file() else []), *sorted(folder.glob(_FURTHER_FILES))]


@dataclass(slots=True)
class Usage:
    """What was used.

    Attributes:
        requests: requests that got an answer.
        input_tokens: tokens of prompts.
        output_tokens: tokens generated.
        money: their price.
    """

    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    money: float = 0.0

    def add(self, other: Usage) -> None:
        """Add what was used elsewhere."""
        self.requests += other.requests
        self.input_tokens += other.input_tokens
        self.output_tokens += other.output_tokens
        self.money += other.money

    def amount(self, unit: Unit) -> float:
        """Return how much of a unit was used."""
        amounts: dict[Unit, float] = {
            "inputTokens": self.input_tokens,
            "outputTokens": self.output_tokens,
            "money": self.money,
        }
        return amounts[unit]


def day_of(time_s: float) -> str:
    """Return the day of a time in seconds since the epoch, as 2026-11-29."""
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d")


def period_name(time_s: float, period: Period) -> str:
    """Return the day or the month of a time, as 2026-11-29 or 2026-11."""
    return day_of(time_s) if period == "day" else day_of(time_s)[:7]


def period_end_s(time_s: float, period: Period) -> float:
    """Return when the period of a time ends, in seconds since the epoch."""
    start = datetime.fromtimestamp(time_s, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    if period == "day":
        return (start + timedelta(days=1)).timestamp()
    return (start.replace(day=1) + timedelta(days=32)).replace(day=1).timestamp()


@dataclass(slots=True)
class TenantUsage:
    """A tenant's usage by day and model.

    Attributes:
        days: usage by day and model.
    """

    days: dict[str, dict[str, Usage]] = field(default_factory=dict)

    def add(self, time_s: float, model: str, usage: Usage) -> None:
        """Count usage of a model."""
        self.days.setdefault(day_of(time_s), {}).setdefault(model, Usage()).add(usage)

    def include(self, other: TenantUsage) -> None:
        """Add what was counted elsewhere."""
        for day, models in other.days.items():
            for model, usage in models.items():
                self.days.setdefault(day, {}).setdefault(model, Usage()).add(usage)

    def in_period(self, time_s: float, period: Period) -> Usage:
        """Return the usage of the period of a time, over all models."""
        name, total = period_name(time_s, period), Usage()
        for day, models in self.days.items():
            if day.startswith(name):
                for usage in models.values():
                    total.add(usage)
        return total

    def drop_before(self, day: str) -> None:
        """Forget what was used before a day."""
        self.days = {name: models for name, models in self.days.items() if name >= day}


def read_usage(files: Iterable[Path]) -> tuple[dict[str, TenantUsage], dict[str, str]]:
    """Return the sums of files, as `load_usage` does of one; raises OSError or ValueError."""
    totals: dict[str, TenantUsage] = {}
    currencies: dict[str, str] = {}
    for file in files:
        usages, found = load_usage(file.read_bytes())
        currencies |= {name: currency for name, currency in found.items() if currency}
        for name, usage in usages.items():
            totals.setdefault(name, TenantUsage()).include(usage)
    return totals, currencies


def dump_usage(usages: dict[str, TenantUsage], currencies: dict[str, str]) -> bytes:
    """Return the content of the file.

    Args:
        usages: usage by tenant.
        currencies: the currency of each tenant that has prices.
    """
    tenants = {
        name: {"currency": currencies.get(name, ""), "days": asdict(usage)["days"]}
        for name, usage in usages.items()
    }
    return json.dumps({"version": 1, "tenants": tenants}).encode()


def load_usage(content: bytes) -> tuple[dict[str, TenantUsage], dict[str, str]]:
    """Return usage and currencies by tenant; raises ValueError if the content is no such file."""
    value: Any = json.loads(content)
    try:
        tenants = value["tenants"].items()
        usages = {name: _parse_days(entry["days"]) for name, entry in tenants}
        return usages, {name: str(entry["currency"]) for name, entry in tenants}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"got no usage of tenants ({error!r})") from error


def _parse_days(days: dict[str, dict[str, dict[str, Any]]]) -> TenantUsage:
    return TenantUsage(
        {
            day: {model: Usage(**usage) for model, usage in models.items()}
            for day, models in days.items()
        }
    )
