"""`faasmoe tenants`: lists the tenants of files, and shows and exports what they used.

Usage is read from the file that the gateway keeps beside the first file, so it can be read while
the models are served and afterwards.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterable, Iterator
from datetime import date, timedelta
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from faasmoe_contracts.api_keys import KeyReadError, read_named_digests
from faasmoe_contracts.tenant_usage import USAGE_FILE_NAME, TenantUsage, Usage, load_usage
from faasmoe_operator.cli.deployment import Deployment, LocalTenant
from faasmoe_operator.cli.formatting import format_table
from faasmoe_operator.errors import CommandError

LIST_HEADER = ("TENANT", "KEYS", "WEIGHT", "MODELS")
USAGE_HEADER = ("TENANT", "PERIOD", "REQUESTS", "INPUT", "OUTPUT", "COST")
PROVIDER = "FaaSMoE"


class UsageRow(NamedTuple):
    """What a tenant used of a model on one day."""

    day: str
    tenant: str
    model: str
    usage: Usage
    currency: str


def add_commands(commands: Any) -> None:
    """Add `faasmoe tenants`."""
    parser = commands.add_parser(
        "tenants",
        help="list tenants, show and export their usage",
        description="List the tenants of files of `faasmoe up`, show and export what they used.",
        epilog="Examples:\n"
        "  faasmoe tenants list -f models/\n"
        "  faasmoe tenants usage -f models/\n"
        "  faasmoe tenants export -f models/ --format focus --month 2026-11 > usage.jsonl",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="tenants with their keys and models")
    listing.set_defaults(run=run_list)
    usage = actions.add_parser("usage", help="what each tenant used by day or month")
    usage.add_argument(
        "--by", choices=("day", "month"), default="month", help="period (default: %(default)s)"
    )
    usage.set_defaults(run=run_usage)
    export = actions.add_parser(
        "export", help="usage by day, tenant and model, as CSV or FOCUS-like JSON lines"
    )
    export.add_argument("--format", choices=("csv", "focus"), default="csv")
    export.add_argument("--month", type=_month, metavar="YYYY-MM", help="only of this month")
    export.set_defaults(run=run_export)
    for action in (listing, usage, export):
        action.add_argument(
            "-f",
            "--file",
            dest="files",
            action="append",
            required=True,
            type=Path,
            help="a file or folder as given to `faasmoe up`; repeat it for several",
        )


def _month(text: str) -> str:
    try:
        return date.fromisoformat(f"{text}-01").strftime("%Y-%m")
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a month as 2026-11") from None


def run_list(arguments: argparse.Namespace) -> int:
    """Print the tenants."""
    deployment = Deployment.load(arguments.files)
    rows = [
        (
            tenant.name,
            _describe_keys(tenant),
            str(tenant.tenant.spec.weight),
            ", ".join(tenant.tenant.models_among(deployment.labels)),
        )
        for tenant in deployment.tenants
    ]
    print(format_table(LIST_HEADER, rows))
    return 0


def _describe_keys(tenant: LocalTenant) -> str:
    """Return the names of a tenant's keys, which are no secret, and when they expire."""
    try:
        names = read_named_digests(tenant.keys_path)
    except KeyReadError as error:
        return f"unreadable ({error})"
    expiry = {key.name: key.expires_at for key in tenant.tenant.spec.keys}
    described = [
        name if (at := expiry.get(name)) is None else f"{name} until {at:%Y-%m-%d %H:%M %Z}"
        for name in names
    ]
    return ", ".join(described) or "none"


def run_usage(arguments: argparse.Namespace) -> int:
    """Print what each tenant used in each period."""
    totals: dict[tuple[str, str], tuple[Usage, str]] = {}
    for row in _rows(arguments.files):
        period = row.day if arguments.by == "day" else row.day[:7]
        total, _ = totals.setdefault((row.tenant, period), (Usage(), row.currency))
        total.add(row.usage)
    rows = [
        (
            tenant,
            period,
            str(usage.requests),
            str(usage.input_tokens),
            str(usage.output_tokens),
            f"{usage.money:.2f} {currency}" if currency else "-",
        )
        for (tenant, period), (usage, currency) in sorted(totals.items())
    ]
    print(format_table(USAGE_HEADER, rows))
    return 0


def run_export(arguments: argparse.Namespace) -> int:
    """Write usage by day, tenant and model to standard output."""
    rows = [r for r in _rows(arguments.files) if r.day.startswith(arguments.month or "")]
    write = write_csv if arguments.format == "csv" else write_focus
    write(rows, sys.stdout)
    return 0


def _rows(files: list[Path]) -> list[UsageRow]:
    path = Deployment.load(files).state_path / USAGE_FILE_NAME
    try:
        usages, currencies = load_usage(path.read_bytes())
    except FileNotFoundError:
        raise CommandError(
            f"{path}: not found; `faasmoe up` writes it once a tenant has used something"
        ) from None
    except (OSError, ValueError) as error:
        raise CommandError(f"{path}: {error}") from error
    return sorted(usage_rows(usages, currencies), key=lambda row: row[:3])


def usage_rows(usages: dict[str, TenantUsage], currencies: dict[str, str]) -> Iterator[UsageRow]:
    """Yield a row for each day, tenant and model."""
    for tenant, usage in usages.items():
        for day, models in usage.days.items():
            for model, used in models.items():
                yield UsageRow(day, tenant, model, used, currencies.get(tenant, ""))


def write_csv(rows: Iterable[UsageRow], file: TextIO) -> None:
    """Write rows as CSV with a header."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(
        ("day", "tenant", "model", "requests", "input_tokens", "output_tokens", "cost", "currency")
    )
    for day, tenant, model, usage, currency in rows:
        counts = (usage.requests, usage.input_tokens, usage.output_tokens)
        writer.writerow((day, tenant, model, *counts, usage.money, currency))


def write_focus(rows: Iterable[UsageRow], file: TextIO) -> None:
    """Write rows as JSON lines with FOCUS's column names; its quantity is tokens of both kinds."""
    for day, tenant, model, usage, currency in rows:
        end = date.fromisoformat(day) + timedelta(days=1)
        line = {
            "ChargePeriodStart": f"{day}T00:00:00Z",
            "ChargePeriodEnd": f"{end.isoformat()}T00:00:00Z",
            "ProviderName": PROVIDER,
            "ServiceCategory": "AI and Machine Learning",
            "ServiceName": "Text generation",
            "SubAccountId": tenant,
            "ResourceId": model,
            "ChargeCategory": "Usage",
            "ConsumedQuantity": usage.input_tokens + usage.output_tokens,
            "ConsumedUnit": "Tokens",
            "BilledCost": usage.money,
            "BillingCurrency": currency or None,
            "x_Requests": usage.requests,
            "x_InputTokens": usage.input_tokens,
            "x_OutputTokens": usage.output_tokens,
        }
        print(json.dumps(line), file=file)
