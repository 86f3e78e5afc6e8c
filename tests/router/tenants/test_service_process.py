"""`python -m faasmoe_router` with tenants, expert functions in a sandbox and a state folder."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from faasmoe_up import free_port
from fake_control import FakeControl
from sandbox_processes import StartSandbox, block_specs

from faasmoe_contracts.parent_death import PARENT_PID_ENV
from faasmoe_contracts.routing_table import RoutingTable
from faasmoe_contracts.store import Store
from faasmoe_router.checkpoint.prepare import prepare

DEADLINE_S = 120.0
TOKEN = "secret"
Until = Callable[[Callable[[], bool]], None]


@pytest.fixture(scope="module")
def store(base_model: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder: Path = tmp_path_factory.mktemp("tenants")
    base_model.save_pretrained(folder / "checkpoint")
    tokenizer.save_pretrained(folder / "checkpoint")
    return prepare(str(folder / "checkpoint"), folder / "store")


@pytest.fixture(scope="module")
def table(store: Store, sandbox: StartSandbox) -> Iterator[RoutingTable]:
    with sandbox(capacity=9, token=TOKEN) as box:
        entries = [box.attach(store, spec) for spec in block_specs(store, 2)]
        yield RoutingTable(store.manifest.digest, 1, tuple(entries))


@pytest.fixture
def tenants(tmp_path: Path) -> Path:
    for name in ("acme", "beta"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "key").write_text(f"{name}-key")
    given = [{"name": name, "keysPath": str(tmp_path / name)} for name in ("acme", "beta")]
    path = tmp_path / "tenants.json"
    path.write_text(json.dumps({"version": 1, "model": "tiny", "tenants": given}))
    return path


@dataclass(frozen=True, slots=True)
class Router:
    """A running router process."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def get(self, path: str, *, tenant: str = "acme") -> httpx.Response:
        headers = {"Authorization": f"Bearer {tenant}-key"}
        return httpx.get(f"{self.url}{path}", headers=headers, timeout=DEADLINE_S)

    def complete(self, tenant: str, **fields: Any) -> httpx.Response:
        body = {"model": "tiny", "prompt": "the quick", "max_tokens": 8, **fields}
        headers = {"Authorization": f"Bearer {tenant}-key"}
        url = f"{self.url}/{tenant}/v1/completions"
        return httpx.post(url, json=body, headers=headers, timeout=DEADLINE_S)

    def sum_of(self, name: str, *, tenant: str = "acme") -> float:
        """Return the sum of a metric over its labels, as far as a tenant sees it."""
        text = self.get("/metrics", tenant=tenant).text
        return sum(map(float, re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)))


@contextmanager
def running(store: Store, log: Path, **settings: Any) -> Iterator[Router]:
    port = free_port()
    given = {"STORE": store.path, "MODEL_NAME": "tiny", "PORT": port, "DEVICE": "cpu", **settings}
    env = {name: value for name, value in os.environ.items() if not name.startswith("FAASMOE_")}
    env |= {f"FAASMOE_{name}": str(value) for name, value in given.items()}
    env |= {PARENT_PID_ENV: str(os.getpid()), "FAASMOE_TOKEN": TOKEN}
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "faasmoe_router"], env=env, stdout=output, stderr=output
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(url, process, log)
        yield Router(url, process, log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0, log.read_text()
        assert not re.search("Traceback|ERROR", log.read_text()), log.read_text()
    finally:
        process.kill()
        process.wait()


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end_s = time.monotonic() + DEADLINE_S
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end_s, log.read_text()
        try:
            if httpx.get(f"{url}/health", timeout=60).status_code == 200:
                return
        except httpx.ConnectError:
            time.sleep(0.05)


def test_function_cost_is_attributed_to_tenants_and_persisted(
    store: Store, table: RoutingTable, tenants: Path, tmp_path: Path, until: Until
) -> None:
    (tmp_path / "table.json").write_text(json.dumps(table.to_json()))
    settings = {
        "TABLE": tmp_path / "table.json",
        "TENANTS_FILE": tenants,
        "STATE_DIR": tmp_path / "state",
    }
    log = tmp_path / "log"
    with running(store, log, **settings) as router:
        assert router.complete("acme", max_tokens=60).status_code == 200
        assert router.complete("beta").status_code == 200
        assert router.sum_of("faasmoe_router_local_computations_total") == 0
        # Every call is over, so the whole cost is attributed within a second or two.
        for unit in ("seconds", "gb_seconds"):
            until(partial(_is_attributed, router, unit))
        before = router.get("/v1/usage").json()
        assert (
            before["expert_gb_seconds"]
            > router.get("/v1/usage", tenant="beta").json()["expert_gb_seconds"]
        )
    saved = json.loads((tmp_path / "state" / "usage.json").read_text())["tenants"]["acme"]
    assert saved["generated_tokens"] == before["completion_tokens"] == 60
    # Not equal to `before`, because another call may have been counted since.
    assert saved["cost"]["seconds"] >= before["expert_seconds"]
    with running(store, log, **settings) as router:
        after = router.get("/v1/usage").json()
    assert after["expert_seconds"] == pytest.approx(saved["cost"]["seconds"])
    assert after["expert_gb_seconds"] == pytest.approx(saved["cost"]["gb_seconds"])
    assert after["completion_tokens"] == 60
    assert "acme-key" not in log.read_text()


def _is_attributed(router: Router, unit: str) -> bool:
    total = router.sum_of(f"faasmoe_router_expert_{unit}_total")
    name = f"faasmoe_tenant_expert_{unit}_total"
    attributed = sum(router.sum_of(name, tenant=tenant) for tenant in ("acme", "beta"))
    return total > 0 and abs(total - attributed) < 1e-9 + 1e-6 * total


def test_load_reports_contain_the_tenants_key_counts(
    store: Store, table: RoutingTable, tenants: Path, tmp_path: Path, until: Until
) -> None:
    (tmp_path / "acme" / "second").write_text("another")
    with FakeControl(table, token=TOKEN).running() as control:
        settings = {"CONTROL_URL": control.url, "TENANTS_FILE": tenants}
        with running(store, tmp_path / "log", **settings):
            until(lambda: bool(control.load_reports))
            assert control.load_reports[-1]["tenants"] == {"acme": 2, "beta": 1}
            (tmp_path / "beta" / "key").unlink()
            until(lambda: control.load_reports[-1]["tenants"] == {"acme": 2, "beta": 0})


def test_usage_is_reported_to_the_last_token_and_includes_other_routers(
    store: Store, table: RoutingTable, tenants: Path, tmp_path: Path, until: Until
) -> None:
    with FakeControl(table, token=TOKEN).running() as control:
        control.usage_totals = {"acme": {"generated_tokens": 100}}
        settings = {"CONTROL_URL": control.url, "TENANTS_FILE": tenants}
        with running(store, tmp_path / "log", **settings) as router:
            until(lambda: router.get("/v1/usage").json()["completion_tokens"] == 100)
            answer = router.complete("acme", max_tokens=8)
            assert answer.json()["system_fingerprint"].startswith("fp_")
            assert router.get("/v1/usage").json()["completion_tokens"] == 108
            assert router.get("/v1/usage").json()["since"] == 90
        last = control.usage_reports[-1]
        assert (last["ends"], last["tenants"]["acme"]["generated_tokens"]) == (True, 8)
        assert len({body["book"] for body in control.usage_reports}) == 1


def test_an_invalid_tenants_file_ends_the_process_with_one_line(
    store: Store, tmp_path: Path
) -> None:
    path = tmp_path / "tenants.json"
    path.write_text("{}")
    env = {
        **os.environ,
        "FAASMOE_STORE": str(store.path),
        "FAASMOE_CONTROL_URL": "http://127.0.0.1:1",
        "FAASMOE_DEVICE": "cpu",
        "FAASMOE_TENANTS_FILE": str(path),
    }
    ended = subprocess.run(
        [sys.executable, "-m", "faasmoe_router"],
        env=env,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert ended.returncode == 2, ended.stderr
    last = ended.stderr.splitlines()[-1]
    assert last == f"faasmoe_router: FAASMOE_TENANTS_FILE: {path}: version: missing"
