"""What `faasmoe doctor` says of a machine."""

import json
import socket
from pathlib import Path

import pytest

from faasmoe_operator.cli import doctor, main
from faasmoe_operator.cli.doctor import Check, Verdict

GIB = 1 << 30


@pytest.mark.parametrize(
    ("check", "verdict"),
    [
        (doctor.check_python((3, 12, 1)), Verdict.OK),
        (doctor.check_python((3, 10, 0)), Verdict.FAILED),
        (doctor.check_packages(lambda name: "1.0"), Verdict.OK),
        (doctor.check_packages(lambda name: None if name == "torch" else "1"), Verdict.FAILED),
        (doctor.check_cores(8), Verdict.OK),
        (doctor.check_cores(1), Verdict.WARNING),
        (doctor.check_memory(64 * GIB, 32 * GIB, None), Verdict.OK),
        (doctor.check_memory(64 * GIB, 1 * GIB, None), Verdict.WARNING),
        (doctor.check_memory(64 * GIB, 32 * GIB, 2 * GIB), Verdict.WARNING),
        (doctor.check_shared_memory(GIB), Verdict.OK),
        (doctor.check_shared_memory(64 << 20), Verdict.WARNING),
        (doctor.check_shared_memory(None), Verdict.WARNING),
        (doctor.check_disk(Path("/x"), 100 * GIB), Verdict.OK),
        (doctor.check_disk(Path("/x"), GIB), Verdict.WARNING),
        (doctor.check_open_files(65536, 65536), Verdict.OK),
        (doctor.check_open_files(1024, 1 << 20), Verdict.WARNING),
        (doctor.check_traces(False), Verdict.OK),
    ],
    ids=lambda value: value.name if isinstance(value, Check) else "",
)
def test_a_check_gives_its_verdict_and_advice(check: Check, verdict: Verdict) -> None:
    assert check.verdict is verdict
    assert bool(check.advice) == (verdict is not Verdict.OK)


def test_a_missing_package_is_named() -> None:
    check = doctor.check_packages(lambda name: None if name == "torch" else "1")
    assert "torch are missing" in check.found
    assert "faasmoe[all]" in check.advice


def test_a_port_that_is_taken_is_a_warning() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert doctor.check_port("127.0.0.1", port).verdict is Verdict.WARNING
    assert doctor.check_port("127.0.0.1", port).verdict is Verdict.OK


@pytest.mark.parametrize(
    ("description", "verdict"),
    [("native (avx2)", Verdict.OK), ("torch: no library was compiled", Verdict.WARNING)],
)
def test_kernels(description: str, verdict: Verdict) -> None:
    assert doctor.check_kernels(description).verdict is verdict


def test_this_machine_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["doctor", "--json"])
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)}
    assert checks["Python"]["verdict"] == "ok"
    assert status == int(any(c["verdict"] == "failed" for c in checks.values()))
    assert {"memory", "disk", "CPU kernels", "runtime folder"} <= set(checks)
    assert main(["doctor"]) == status
    assert "CPU kernels" in capsys.readouterr().out


def test_only_failures_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    for verdict, status in ((Verdict.WARNING, 0), (Verdict.FAILED, 1)):
        checks = [Check("x", verdict, "y", "z")]
        monkeypatch.setattr(doctor, "run_checks", lambda checks=checks, **_: checks)
        assert main(["doctor"]) == status
