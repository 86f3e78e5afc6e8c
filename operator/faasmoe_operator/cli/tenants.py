"""`faasmoe tenants`: lists and creates tenants of files, rotates keys, shows what they used.

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
from faasmoe_contracts.tenant_usage import (
    USAGE_FILE_NAME,
    TenantUsage,
    Usage,
    read_usage,
    usage_files,
)
from faasmoe_operator.cli.deployment import Deployment, LocalTenant
from faasmoe_operator.cli.formatting import format_table
from faasmoe_operator.cli.tenant_files import CreatedKey, create_key, create_tenant, revoke_keys
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
        help="list and create tenants, rotate keys, show and export usage",
        description="List and create tenants in files of `faasmoe up`, rotate their keys, show and "
        "export what\nthey used.",
        epilog="Examples:\n"
        "  faasmoe tenants list -f models/\n"
        "  faasmoe tenants create acme -f models/ --model chat --requests-per-minute 600\n"
        "  faasmoe tenants rotate acme -f models/            # add a key; later:\n"
        "  faasmoe tenants rotate acme -f models/ --no-new-key --revoke key-1\n"
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
    create = actions.add_parser("create", help="add a tenant with a new key")
    create.add_argument("name", metavar="NAME", help="name of the tenant")
    create.add_argument(
        "--model",
        dest="models",
        action="append",
        required=True,
        metavar="NAME",
        help="a MoEModel that it may use; repeat it for several",
    )
    create.add_argument("--weight", type=int, help="relative share of the tokens under contention")
    create.add_argument("--priority", type=int, help="tenants of higher priority go first")
    create.add_argument("--host", help="host name that its requests alone may have")
    create.add_argument("--requests-per-minute", type=int, metavar="N", help="limit")
    create.add_argument("--tokens-per-minute", type=int, metavar="N", help="limit")
    create.set_defaults(run=run_create)
    rotate = actions.add_parser("rotate", help="add a key of a tenant, remove others")
    rotate.add_argument("name", metavar="NAME", help="name of the tenant")
    rotate.add_argument("--key-name", metavar="KEY", help="name of the new key (default: key-N)")
    rotate.add_argument(
        "--new-key",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="add a key (default: %(default)s)",
    )
    rotate.add_argument(
        "--revoke",
        action="append",
        default=[],
        metavar="KEY",
        help="name of a key to remove, which ends to be accepted; repeat it for several",
    )
    rotate.set_defaults(run=run_rotate)
    for action in (listing, usage, export, create, rotate):
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


def run_create(arguments: argparse.Namespace) -> int:
    """Add a tenant to a file and print its key."""
    given = {
        "weight": arguments.weight,
        "priority": arguments.priority,
        "host": arguments.host,
        "limits": _without_none(
            requestsPerMinute=arguments.requests_per_minute,
            tokensPerMinute=arguments.tokens_per_minute,
        ),
    }
    spec = {name: value for name, value in given.items() if value not in (None, {})}
    path, key = create_tenant(arguments.files, arguments.name, arguments.models, spec)
    print(f"{arguments.name} is in {path}; `faasmoe up` knows it when it is started again")
    _print_key(key)
    return 0


def run_rotate(arguments: argparse.Namespace) -> int:
    """Add a key of a tenant and remove others."""
    tenants = {tenant.name: tenant for tenant in Deployment.load(arguments.files).tenants}
    tenant = tenants.get(arguments.name)
    if tenant is None:
        expected = ", ".join(sorted(tenants)) or "a tenant of the files, which have none"
        raise CommandError(f"NAME: got {arguments.name!r}, expected {expected}", exit_status=2)
    if not arguments.new_key and not arguments.revoke:
        raise CommandError("--no-new-key: expected --revoke KEY with it", exit_status=2)
    revoke_keys(tenant.keys_path, arguments.revoke)
    if arguments.new_key:
        _print_key(create_key(tenant.keys_path, arguments.key_name))
    print(f"keys of {tenant.name}: {_describe_keys(tenant)}; accepted from now on, within 2 s")
    return 0


def _print_key(created: CreatedKey) -> None:
    print(f"API key, in {created.path}: {created.key}")


def _without_none(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


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
    folder = Deployment.load(files).state_path
    found = usage_files(folder)
    if not found:
        path = folder / USAGE_FILE_NAME
        raise CommandError(
            f"{path}: not found; `faasmoe up` writes it once a tenant has used something"
        )
    try:
        usages, currencies = read_usage(found)
    except (OSError, ValueError) as error:
        raise CommandError(f"{folder}: {error}") from error
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
