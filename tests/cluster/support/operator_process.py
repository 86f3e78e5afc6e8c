"""The operator as a process of this machine, with the permissions of a ServiceAccount."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import httpx
from apiserver import ApiServer, eventually
from metric_samples import check_known, exposed_families

NAMESPACE = "faasmoe-system"
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0
ROUTER_IMAGE = "faasmoe/router:dev"
EXPERT_IMAGE = "faasmoe/expert:dev"


class OperatorProcess:
    """Runs `python -m faasmoe_operator.kube` as a service account; can be killed and restarted.

    Args:
        api: administrator client.
        folder: folder for its kubeconfig and log.
        service_account: its ServiceAccount in NAMESPACE.
        settings: additional FAASMOE_OPERATOR_* variables, without the prefix.
    """

    def __init__(
        self,
        api: ApiServer,
        folder: Path,
        *,
        service_account: str,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self._api = api
        self.service_account = service_account
        self._kubeconfig = folder / "kubeconfig"
        self.log_file = folder / "operator.log"
        self._port, self._metrics_port = _free_port(), _free_port()
        self._settings = settings or {}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """URL of its control API."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def metrics_address(self) -> str:
        """Address of its metrics, which are not on the port of the control API."""
        return f"127.0.0.1:{self._metrics_port}"

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it and wait until it is ready."""
        token = self._api.create_token(NAMESPACE, self.service_account)
        config = self._api.credentials.kubeconfig_for(token, namespace=NAMESPACE)
        self._kubeconfig.touch(mode=0o600)
        self._kubeconfig.write_text(config)
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "faasmoe_operator.kube"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(),
            )
        eventually(self._is_ready, lambda ready: ready, timeout_s=START_TIMEOUT_S)

    def kill(self) -> None:
        """Kill it, as a lost node would."""
        self._terminate(signal.SIGKILL)

    def stop(self) -> None:
        """Terminate it and wait until it has exited."""
        self._terminate(signal.SIGTERM)

    def log(self) -> str:
        """Return its log."""
        return self.log_file.read_text(errors="replace")

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of a metric's samples that carry these labels."""
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        text = httpx.get(f"http://{self.metrics_address}/metrics", trust_env=False).text
        check_known(name, exposed_families(text))
        lines = [line for line in text.splitlines() if line.startswith((f"{name} ", f"{name}{{"))]
        return sum(float(x.rpartition(" ")[2]) for x in lines if all(w in x for w in wanted))

    def _is_ready(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise AssertionError(f"the operator exited: {self.log()[-4000:]}")
        try:
            return httpx.get(f"{self.url}/readyz", trust_env=False).is_success
        except httpx.TransportError:
            return False

    def _terminate(self, number: int) -> None:
        if self._process is None:
            return
        self._process.send_signal(number)
        deadline_s = time.monotonic() + STOP_TIMEOUT_S
        try:
            self._process.wait(deadline_s - time.monotonic())
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise AssertionError(
                f"still running after {STOP_TIMEOUT_S:g} s: {self.log()}"
            ) from None
        finally:
            self._process = None

    def _environment(self) -> dict[str, str]:
        settings = {
            "NAMESPACE": NAMESPACE,
            "HOST": "127.0.0.1",
            "PORT": str(self._port),
            "METRICS_PORT": str(self._metrics_port),
            "CONTROL_URL": self.url,
            "ROUTER_IMAGE": ROUTER_IMAGE,
            "EXPERT_IMAGE": EXPERT_IMAGE,
            **self._settings,
        }
        return {
            **{name: value for name, value in os.environ.items() if name != "KUBECONFIG"},
            "KUBECONFIG": str(self._kubeconfig),
            **{f"FAASMOE_OPERATOR_{name}": value for name, value in settings.items()},
        }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
