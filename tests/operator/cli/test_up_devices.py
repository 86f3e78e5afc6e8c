"""What is asked for and not there is told before anything is started."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from faasmoe_operator.api.v1alpha1 import MoEModelError
from faasmoe_operator.cli.up import DEVICE_PROBE_COMMAND, check_devices
from faasmoe_operator.control.local_model import LocalModel
from faasmoe_operator.errors import CommandError

WriteModel = Callable[..., Path]


def probe_printing(n_devices: int, why_none: str | None = None) -> tuple[str, ...]:
    text = json.dumps({"n_devices": n_devices, "why_none": why_none})
    return (sys.executable, "-c", f"print({text!r})")


def check_file(file: Path, command: tuple[str, ...]) -> None:
    asyncio.run(check_devices(LocalModel.load(file), command=command))


def test_every_field_that_asks_for_cuda_is_named(write_model: WriteModel) -> None:
    file = write_model("router: {device: cuda}", "experts: {device: cuda}")
    with pytest.raises(MoEModelError) as refused:
        check_file(file, probe_printing(0, "no driver; install one"))
    assert refused.value.problems == (
        "spec.router.device: got cuda, expected cpu or auto on this machine: "
        "no driver; install one",
        "spec.experts.device: got cuda, expected cpu or auto on this machine: "
        "no driver; install one",
    )


@pytest.mark.parametrize("asked", ["router", "experts"])
def test_each_is_asked_for_on_its_own(asked: str, write_model: WriteModel) -> None:
    other = {"router": "experts", "experts": "router"}[asked]
    file = write_model(f"{asked}: {{device: cuda}}", f"{other}: {{device: cpu}}")
    with pytest.raises(MoEModelError) as refused:
        check_file(file, probe_printing(0, "none"))
    assert [p.partition(":")[0] for p in refused.value.problems] == [f"spec.{asked}.device"]
    check_file(file, probe_printing(1))


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_nobody_is_asked_where_no_device_is_needed(device: str, write_model: WriteModel) -> None:
    file = write_model(f"router: {{device: {device}}}", f"experts: {{device: {device}}}")
    check_file(file, ("/nowhere/python",))


def test_an_answer_that_is_none_is_told(write_model: WriteModel) -> None:
    file = write_model("router: {device: cuda}")
    with pytest.raises(CommandError, match="ended with status 3"):
        check_file(file, (sys.executable, "-c", "raise SystemExit(3)"))


def test_the_data_plane_says_what_it_finds() -> None:
    shown = subprocess.run(DEVICE_PROBE_COMMAND, capture_output=True, text=True, check=True)
    found = json.loads(shown.stdout)
    assert (found["n_devices"] == 0) == bool(found["why_none"])
