"""A lost device ends only its own process, which is replaced."""

from pathlib import Path

import httpx
import pytest
from faasmoe_up import FaasmoeUp, running_up, wait_until
from raw_http import request_frame
from sandbox_processes import PreparedStore, StartSandbox, make_function_spec
from tiny_system import assert_same_responses, moemodel_yaml, request_completions

pytestmark = pytest.mark.usefixtures("emulated")


@pytest.fixture
def lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file; while it exists, the device is lost to every process that tests start."""
    path = tmp_path / "lost"
    monkeypatch.setenv("EMULATED_LOST", str(path))
    return path


def test_sandbox_reports_a_lost_device_and_exits(
    sandbox: StartSandbox, prepared_store: PreparedStore, lost: Path
) -> None:
    store = prepared_store("mixtral")
    spec = make_function_spec(store, [0], [0, 1, 2])
    with sandbox(device="cuda", drain_s=5) as box:
        box.attach(store, spec)
        url = f"/v1/functions/{spec.id}"
        assert box.http.post(url, content=request_frame()).status_code == 200
        lost.touch()
        answer = box.http.post(url, content=request_frame())
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (503, "device_lost")
        assert "illegal memory access" in error["message"]
        assert box.http.get("/readyz").json() == {"status": "draining"}
        box.http.close()
        assert box.process.wait(120) == 1
        log = box.log.read_text()
    assert "is lost" in log.splitlines()[-1]
    assert log.count("CRITICAL") == 1


def test_functions_move_to_new_sandboxes_and_no_request_fails(
    tiny_model: Path, tmp_path: Path, lost: Path
) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(moemodel_yaml(tiny_model, router="cpu", experts="cuda"))
    with running_up(file, tmp_path / "up.log") as up:
        expected = request_completions(up)
        before = {process.pid for process in up.sandboxes}
        lost.touch()
        assert_same_responses(request_completions(up), expected)  # computed by the router
        wait_until(lambda: before.isdisjoint(sandbox_pids(up)), timeout_s=120, what="they ended")
        lost.unlink()
        wait_until(lambda: all_functions_ready(up), timeout_s=120, what="all functions are up")
        n_here = up.router_metric("local_computations_total")
        assert_same_responses(request_completions(up), expected)
        assert up.router_metric("local_computations_total") == n_here
    assert "is lost (" in (tmp_path / "up.log").read_text()


def test_a_router_that_lost_its_device_is_replaced(
    tiny_model: Path, tmp_path: Path, lost: Path
) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(moemodel_yaml(tiny_model, router="cuda", experts="cpu"))
    with running_up(file, tmp_path / "up.log") as up:
        expected = request_completions(up)
        lost.touch()
        with pytest.raises((AssertionError, httpx.HTTPError)):
            request_completions(up)
        ended = "the router ended with status 1; restarting it"
        wait_until(lambda: ended in up.log.read_text(), timeout_s=120, what="it ended")
        lost.unlink()
        wait_until(lambda: is_healthy(up), timeout_s=120, what="another router is ready")
        assert_same_responses(request_completions(up), expected)
        log = up.log.read_text()
    assert "The engine gives up: the device emulated:0 is lost: CUDA error: an illegal" in log


def is_healthy(up: FaasmoeUp) -> bool:
    try:
        return httpx.get(f"{up.base_url}/health", timeout=60, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def sandbox_pids(up: FaasmoeUp) -> set[int]:
    return {process.pid for process in up.sandboxes}


def all_functions_ready(up: FaasmoeUp) -> bool:
    request_completions(up)
    return all(function["ready"] > 0 for function in up.status()["functions"])
