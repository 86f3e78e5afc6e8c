"""`faasmoe up --gateways 2`: clients see one limit, one budget and one account of usage."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from faasmoe_up import FaasmoeUp, running_up, wait_until
from tiny_chat import save_tiny_chat_model
from tiny_system import moemodel_yaml

from faasmoe_operator.cli import main

LIMIT = 40
TENANT = """\
apiVersion: faasmoe.dev/v1alpha1
kind: Tenant
metadata: {name: %(name)s}
spec:
  apiKeysPath: keys/%(name)s
  models: [{name: tiny}]
  limits: {requestsPerMinute: %(limit)d}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gateways")
    served = path / "served"
    served.mkdir()
    document = yaml.safe_load(
        moemodel_yaml(save_tiny_chat_model(path / "model"), router="cpu", experts="cpu")
    )
    document["spec"]["store"]["path"] = "../store"
    (served / "tiny.yaml").write_text(yaml.safe_dump(document))
    for name in ("acme", "beta"):
        (served / f"{name}.yaml").write_text(TENANT % {"name": name, "limit": LIMIT})
        (served / "keys" / name).mkdir(parents=True)
        (served / "keys" / name / "key").write_text(f"sk-{name}")
    return path


@pytest.fixture(scope="module")
def up(folder: Path) -> Iterator[FaasmoeUp]:
    with running_up(folder / "served", folder / "up.log", "--gateways", "2") as running:
        yield running


def gateways(up: FaasmoeUp) -> list[psutil.Process]:
    children = psutil.Process(up.process.pid).children()
    return [process for process in children if "faasmoe_gateway" in process.cmdline()]


def complete(up: FaasmoeUp, key: str) -> int:
    """Send a request over a connection of its own, which either gateway may get."""
    response = httpx.post(
        f"{up.base_url}/v1/completions",
        json={"model": "tiny", "prompt": "the quick", "max_tokens": 1},
        headers={"Authorization": f"Bearer {key}"},
        timeout=120,
        trust_env=False,
    )
    assert response.status_code in (200, 429), response.text
    return response.status_code


def count_admitted(up: FaasmoeUp, key: str) -> tuple[int, float]:
    """Send twice as many requests as the limit at once; return those admitted, and the seconds."""
    started_s = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        seen = list(pool.map(lambda _: complete(up, key), range(2 * LIMIT)))
    return seen.count(200), time.monotonic() - started_s


def used_requests(up: FaasmoeUp, key: str) -> Any:
    headers = {"Authorization": f"Bearer {key}"}
    response = httpx.get(f"{up.base_url}/v1/usage", headers=headers, trust_env=False, timeout=60)
    return response.json()["day"]["requests"]


def test_limit_and_usage_hold_over_gateways(up: FaasmoeUp) -> None:
    assert len(gateways(up)) == 2
    n_admitted, seconds = count_admitted(up, "sk-acme")
    assert 0.9 * LIMIT <= n_admitted <= LIMIT * (1 + seconds / 60)
    wait_until(
        lambda: {used_requests(up, "sk-acme") for _ in range(8)} == {n_admitted},
        timeout_s=60,
        what="the sum of usage at both gateways",
    )


def test_limit_holds_without_the_authority(up: FaasmoeUp) -> None:
    control = up.child_running("faasmoe_operator.control")
    assert control is not None
    assert complete(up, "sk-beta") == 200  # so that one of the gateways has a share
    control.send_signal(signal.SIGSTOP)
    try:
        n_admitted, seconds = count_admitted(up, "sk-beta")
    finally:
        control.send_signal(signal.SIGCONT)
    assert 1 + n_admitted <= LIMIT * (1 + seconds / 60)


def test_gateway_that_dies_is_replaced(up: FaasmoeUp) -> None:
    victim = gateways(up)[1]
    victim.send_signal(signal.SIGKILL)
    victim.wait(30)
    wait_until(lambda: len(gateways(up)) == 2, timeout_s=60, what="two gateways")
    wait_until(lambda: complete(up, "sk-acme") == 200, timeout_s=90, what="an admitted request")


def test_usage_of_all_gateways_is_exported(
    up: FaasmoeUp, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = used_requests(up, "sk-acme")

    def saved_requests() -> int:
        assert main(["tenants", "usage", "-f", str(folder / "served")]) == 0
        rows = [line.split() for line in capsys.readouterr().out.splitlines()]
        return next((int(row[2]) for row in rows if row[0] == "acme"), 0)

    wait_until(lambda: saved_requests() == expected, timeout_s=60, what="usage in the files")
