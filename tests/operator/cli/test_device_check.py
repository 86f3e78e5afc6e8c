"""Checks of devices, with scripts in place of the real device probe."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from faasmoe_operator.api.v1alpha1 import MoEModelError
from faasmoe_operator.cli.device_check import PROBE_COMMAND, check_devices
from faasmoe_operator.control.local_model import LocalModel
from faasmoe_operator.errors import CommandError

WriteModel = Callable[..., Path]


def probe_printing(n_devices: int, why_none: str | None = None) -> tuple[str, ...]:
    text = json.dumps({"n_devices": n_devices, "why_none": why_none})
    return (sys.executable, "-c", f"print({text!r})")


def check_file(file: Path, command: tuple[str, ...]) -> None:
    asyncio.run(check_devices(LocalModel.load(file), command=command))


def test_error_names_every_field_that_requests_cuda(write_model: WriteModel) -> None:
    file = write_model("router: {device: cuda}", "experts: {device: cuda}")
    with pytest.raises(MoEModelError) as raised:
        check_file(file, probe_printing(0, "no driver; install one"))
    assert raised.value.problems == (
        "spec.router.device: got cuda, expected cpu or auto on this machine: "
        "no driver; install one",
        "spec.experts.device: got cuda, expected cpu or auto on this machine: "
        "no driver; install one",
    )


@pytest.mark.parametrize("section", ["router", "experts"])
def test_checks_router_and_experts_separately(section: str, write_model: WriteModel) -> None:
    other = {"router": "experts", "experts": "router"}[section]
    file = write_model(f"{section}: {{device: cuda}}", f"{other}: {{device: cpu}}")
    with pytest.raises(MoEModelError) as raised:
        check_file(file, probe_printing(0, "none"))
    assert [p.partition(":")[0] for p in raised.value.problems] == [f"spec.{section}.device"]
    check_file(file, probe_printing(1))


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_skips_probe_when_cuda_is_not_requested(device: str, write_model: WriteModel) -> None:
    file = write_model(f"router: {{device: {device}}}", f"experts: {{device: {device}}}")
    check_file(file, ("/nowhere/python",))


def test_reports_failed_probe(write_model: WriteModel) -> None:
    file = write_model("router: {device: cuda}")
    with pytest.raises(CommandError, match="ended with status 3"):
        check_file(file, (sys.executable, "-c", "raise SystemExit(3)"))


def test_real_probe_reports_devices_or_reason() -> None:
    process = subprocess.run(PROBE_COMMAND, capture_output=True, text=True, check=True)
    devices = json.loads(process.stdout)
    assert (devices["n_devices"] == 0) == bool(devices["why_none"])
