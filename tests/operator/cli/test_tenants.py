"""`faasmoe tenants`: what it prints of files and of the gateway's usage."""

from __future__ import annotations

import csv
import json
from io import StringIO
from pathlib import Path

import pytest

from faasmoe_contracts.tenant_usage import TenantUsage, Usage, dump_usage
from faasmoe_operator.cli import main
from faasmoe_operator.cli.deployment import Deployment, LocalTenant

MODELS = """\
apiVersion: faasmoe.dev/v1alpha1
kind: MoEModel
metadata: {name: chat}
spec: {model: {source: "hf://org/model"}}
---
apiVersion: faasmoe.dev/v1alpha1
kind: Tenant
metadata: {name: acme}
spec:
  apiKeysPath: keys
  keys: [{name: old, expiresAt: 2027-01-31T00:00:00Z}]
  models: [{name: chat}]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "keys").mkdir()
    for name in ("old", "new"):
        (tmp_path / "keys" / name).write_text(f"secret-{name}")
    path = tmp_path / "all.yaml"
    path.write_text(MODELS)
    return path


@pytest.fixture
def used(file: Path) -> Path:
    usage = TenantUsage(
        {
            "2026-11-28": {"chat": Usage(2, 30, 10, 0.5)},
            "2026-11-29": {"chat": Usage(1, 5, 1, 0.25), "gone": Usage(1, 1, 1, 0.0)},
            "2026-12-01": {"chat": Usage(9, 9, 9, 9.0)},
        }
    )
    state = file.parent / ".faasmoe" / "gateway.state"
    state.mkdir(parents=True)
    (state / "tenant-usage.json").write_bytes(dump_usage({"acme": usage}, {"acme": "EUR"}))
    return file


def test_lists_tenants_with_the_names_of_their_keys(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tenants", "list", "-f", str(file)]) == 0
    output = capsys.readouterr().out
    assert "new, old until 2027-01-31 00:00 UTC" in output
    assert "secret" not in output


def test_sums_usage_by_period(used: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tenants", "usage", "-f", str(used)]) == 0
    months = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert months == [
        ["acme", "2026-11", "4", "36", "12", "0.75", "EUR"],
        ["acme", "2026-12", "9", "9", "9", "9.00", "EUR"],
    ]
    assert main(["tenants", "usage", "--by", "day", "-f", str(used)]) == 0
    assert "2026-11-28" in capsys.readouterr().out


def test_exports_csv_of_a_month(used: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tenants", "export", "--month", "2026-11", "-f", str(used)]) == 0
    rows = list(csv.DictReader(StringIO(capsys.readouterr().out)))
    assert [(row["day"], row["model"], row["output_tokens"], row["cost"]) for row in rows] == [
        ("2026-11-28", "chat", "10", "0.5"),
        ("2026-11-29", "chat", "1", "0.25"),
        ("2026-11-29", "gone", "1", "0.0"),
    ]


def test_exports_json_lines(used: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tenants", "export", "--format", "focus", "-f", str(used)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 4
    first = lines[0]
    assert first["ChargePeriodEnd"] == "2026-11-29T00:00:00Z"
    assert (first["ConsumedQuantity"], first["BilledCost"]) == (40, 0.5)
    assert (first["SubAccountId"], first["BillingCurrency"]) == ("acme", "EUR")


def test_says_that_nothing_was_used_yet(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tenants", "usage", "-f", str(file)]) == 1
    assert "not found; `faasmoe up` writes it" in capsys.readouterr().err


def test_month_must_be_one(used: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["tenants", "export", "--month", "2026-13", "-f", str(used)])
    assert "expected a month as 2026-11" in capsys.readouterr().err


def load_tenants(*files: Path) -> dict[str, LocalTenant]:
    return {tenant.name: tenant for tenant in Deployment.load(files).tenants}


def test_creates_a_tenant_in_the_file_with_a_key_of_its_own(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", "chat", "--weight", "3", "--requests-per-minute", "60"]
    assert main(["tenants", "create", "beta", "-f", str(file), *options]) == 0
    output = capsys.readouterr().out
    spec = load_tenants(file)["beta"].tenant.spec
    assert (spec.weight, spec.limits.requests_per_minute) == (3, 60)
    key = file.parent / "keys" / "beta" / "key-1"
    assert key.read_text().startswith("sk-")
    assert key.read_text() in output
    assert key.stat().st_mode & 0o077 == 0


def test_creates_a_file_in_a_folder(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(file.parent)
    assert main(["tenants", "create", "beta", "-f", folder, "--model", "chat"]) == 0
    assert set(load_tenants(file.parent)) == {"acme", "beta"}
    assert main(["tenants", "create", "beta", "-f", folder, "--model", "chat"]) == 1
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("acme", ["--model", "chat"], "metadata.name: got 'acme' twice"),
        ("beta", ["--model", "other"], "spec.models.0.name: got 'other', expected"),
        ("Beta", ["--model", "chat"], "metadata.name: got 'Beta'"),
        ("beta", ["--model", "chat", "--weight", "0"], "spec.weight: got 0"),
    ],
)
def test_tenant_that_does_not_fit_is_not_written(
    file: Path, capsys: pytest.CaptureFixture[str], name: str, options: list[str], message: str
) -> None:
    before = file.read_text()
    assert main(["tenants", "create", name, "-f", str(file), *options]) != 0
    assert message in capsys.readouterr().err
    assert file.read_text() == before
    assert not (file.parent / "keys" / name).exists()


def test_rotates_keys(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = file.parent / "keys"
    assert main(["tenants", "rotate", "acme", "-f", str(file), "--revoke", "old"]) == 0
    assert sorted(path.name for path in keys.iterdir()) == ["key-1", "new"]
    assert (keys / "key-1").read_text() in capsys.readouterr().out
    rotate = ["tenants", "rotate", "acme", "-f", str(file), "--no-new-key"]
    assert main([*rotate, "--revoke", "new"]) == 0
    assert [path.name for path in keys.iterdir()] == ["key-1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["other"], "NAME: got 'other', expected acme"),
        (["acme", "--revoke", "none"], "--revoke: got 'none', expected the name of a key"),
        (["acme", "--revoke", "../all.yaml"], "--revoke: got '../all.yaml'"),
        (["acme", "--key-name", "new"], "exists already"),
        (["acme", "--no-new-key"], "expected --revoke KEY"),
    ],
)
def test_rotation_that_cannot_be_changes_nothing(
    file: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["tenants", "rotate", *arguments, "-f", str(file)]) != 0
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in (file.parent / "keys").iterdir()) == ["new", "old"]
