"""A running `faasmoe up` with access to its processes, status and metrics."""

from __future__ import annotations

import atexit
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import psutil
from metric_samples import parse_sample

START_TIMEOUT_S = 600.0
END_TIMEOUT_S = 60.0
AT_ONCE = {"FAASMOE_METRICS_MIN_TOKENS": "1"}  # calls in metrics, for tests that count them
_random = random.SystemRandom()  # tests seed the other one
UP_COMMAND = (sys.executable, "-m", "faasmoe_operator.cli", "up")


@dataclass(frozen=True)
class FaasmoeUp:
    """A running `faasmoe up`.

    Attributes:
        process: the launcher.
        base_url: base URL of the router.
        log: file with the output of all processes.
        runtime: its XDG_RUNTIME_DIR.
    """

    process: subprocess.Popen[bytes]
    base_url: str
    log: Path
    runtime: Path

    @property
    def process_tree(self) -> list[psutil.Process]:
        """The launcher and all its descendants."""
        launcher = psutil.Process(self.process.pid)
        return [launcher, *launcher.children(recursive=True)]

    @property
    def sandboxes(self) -> list[psutil.Process]:
        """Processes of the sandboxes, which are the children of the zygote."""
        zygote = self.child_running("faasmoe_expert.zygote")
        return [] if zygote is None else [p for p in zygote.children() if not _is_gone(p)]

    @property
    def router(self) -> psutil.Process | None:
        """The router, which its zygote has forked and named; None while it is being restarted."""
        zygote = self.child_running("faasmoe_router.zygote")
        routers = [] if zygote is None else [p for p in zygote.children() if not _is_gone(p)]
        return routers[0] if routers else None

    def child_running(self, module: str) -> psutil.Process | None:
        """Return the child of the launcher that runs a module; None if there is none."""
        for process in psutil.Process(self.process.pid).children():
            try:
                if module in process.cmdline():
                    return process
            except psutil.NoSuchProcess:
                continue  # it exited meanwhile
        return None

    @cached_property
    def _runtime_info(self) -> dict[str, Any]:
        files = self.runtime.glob("faasmoe/up-*/control.json")
        entries = [json.loads(file.read_text()) for file in files]
        return next(dict(entry) for entry in entries if entry["pid"] == self.process.pid)

    def request_control(self, method: str, path: str, body: Any = None) -> httpx.Response:
        """Send a request to the control API.

        Raises:
            httpx.TransportError: the control process is not reachable.
            httpx.HTTPStatusError: the response has an error status.
        """
        headers = {"Authorization": f"Bearer {self._runtime_info['token']}"}
        url = self._runtime_info["control_url"] + path
        response = httpx.request(
            method, url, headers=headers, json=body, timeout=60, trust_env=False
        )
        return response.raise_for_status()

    def status(self) -> dict[str, Any]:
        """Return the response to GET /v1/status; raises as `request_control` does."""
        return dict(self.request_control("GET", "/v1/status").json())

    def control_metric(self, name: str) -> float:
        """Return a sample of the control process, named without its prefix but with its labels."""
        exposition = self.request_control("GET", "/metrics").text
        return parse_sample(exposition, f"faasmoe_control_{name}")

    def router_metric(self, name: str) -> float:
        """Return a sample of the router, named without its prefix but with its labels."""
        return parse_sample(
            httpx.get(f"{self.base_url}/metrics", timeout=60).text, f"faasmoe_router_{name}"
        )


def wait_until(condition: Callable[[], bool], *, timeout_s: float, what: str) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {timeout_s:.0f} s: {what}"
        time.sleep(0.1)


def start_up(
    model: Path | str,
    log: Path,
    *options: str,
    variables: Mapping[str, str] | None = None,
    timeout_s: float = START_TIMEOUT_S,
) -> FaasmoeUp:
    """Start `faasmoe up` and wait until it is healthy.

    Args:
        model: a MoEModel file, or MODEL as text.
        log: file for its output.
        options: further options.
        variables: further environment variables.
        timeout_s: how long the start may take.
    """
    port = free_port()
    runtime = Path(tempfile.mkdtemp(prefix="up-"))  # tmp_path is too long for a Unix socket
    atexit.register(shutil.rmtree, runtime, ignore_errors=True)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FAASMOE_")}
    words = [model] if isinstance(model, str) else ["-f", str(model)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*UP_COMMAND, *words, "--port", str(port), *options],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**environment, **AT_ONCE, "XDG_RUNTIME_DIR": str(runtime), **(variables or {})},
        )
    up = FaasmoeUp(process, f"http://127.0.0.1:{port}", log, runtime)

    def is_serving() -> bool:
        assert process.poll() is None, log.read_text()
        return "OpenAI base URL" in log.read_text()

    try:
        wait_until(is_serving, timeout_s=timeout_s, what="serving")
    except BaseException:
        process.kill()
        process.wait()
        raise
    return up


def free_port() -> int:
    """Return a free port that the kernel gives to no connection meanwhile: below its own range."""
    while True:
        port = _random.randrange(20_000, 32_000)
        try:
            with socket.create_server(("127.0.0.1", port)):
                return port
        except OSError:  # taken: the next one
            continue


@contextmanager
def running_up(
    model: Path | str,
    log: Path,
    *options: str,
    variables: Mapping[str, str] | None = None,
    timeout_s: float = START_TIMEOUT_S,
) -> Iterator[FaasmoeUp]:
    """Run `faasmoe up` for the lifetime of the context.

    At its end, the launcher must exit with status 0 and leave no process.
    """
    instance = start_up(model, log, *options, variables=variables, timeout_s=timeout_s)
    try:
        yield instance
    finally:
        processes = instance.process_tree
        instance.process.send_signal(signal.SIGINT)
        status = _exit_status(instance.process)
    assert status == 0, instance.log.read_text()
    wait_until(lambda: all_gone(processes), timeout_s=60, what="all processes to exit")


def _exit_status(process: subprocess.Popen[bytes]) -> int:
    try:
        return process.wait(END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def all_gone(processes: list[psutil.Process]) -> bool:
    return all(map(_is_gone, processes))


def _is_gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
