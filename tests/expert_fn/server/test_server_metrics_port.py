"""A sandbox's metrics on a port of their own, apart from what routers reach."""

import httpx
import pytest
from faasmoe_up import free_port
from raw_http import TOKEN
from sandbox_processes import SandboxProcess, StartSandbox

from faasmoe_expert.config import SandboxConfig, SandboxConfigError


def get(sandbox: SandboxProcess, port: int, path: str) -> httpx.Response:
    host = sandbox.address.partition(":")[0]
    return httpx.get(f"http://{host}:{port}{path}", trust_env=False, timeout=60)


def test_metrics_have_their_port_alone(sandbox: StartSandbox) -> None:
    port = free_port()
    with sandbox(token=TOKEN, metrics_port=port) as running:
        assert "faasmoe_expert_frames_total 0.0" in get(running, port, "/metrics").text
        for path in ("/healthz", "/v1/functions", "/"):
            assert get(running, port, path).status_code == 404
        common = int(running.address.rpartition(":")[2])
        assert get(running, common, "/metrics").status_code == 404
        assert get(running, common, "/healthz").status_code == 200
        running.process.terminate()
        assert running.process.wait(120) == 0


@pytest.mark.parametrize("value", ["-1", "65536", "x"])
def test_an_invalid_port_is_refused(value: str) -> None:
    with pytest.raises(SandboxConfigError, match="FAASMOE_METRICS_PORT"):
        SandboxConfig.from_env({"FAASMOE_METRICS_PORT": value})
