"""`faasmoe up` as a real process with a fake router and fake sandboxes, without torch.

The control process is real; the tests send it the requests that a router would send.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from faasmoe_up import free_port

from faasmoe_contracts.store import QuantizationEntry
from faasmoe_operator.cli.model_source import ModelSource
from faasmoe_operator.cli.store_cache import CachedStore

WriteModel = Callable[..., Path]

COMMAND = (sys.executable, str(Path(__file__).with_name("fake_faasmoe.py")))
DEADLINE_S = 120.0  # a preparation imports torch


class UpWithFakeRouter:
    def __init__(self, process: subprocess.Popen[str], runtime: Path) -> None:
        self.process = process
        self.runtime = runtime
        self.output = ""

    def read_until(self, text: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line
            if text in line:
                return
        raise AssertionError(f"{text!r} not in the output:\n{self.output}")

    def wait_for_exit(self) -> int:
        rest, _ = self.process.communicate(timeout=DEADLINE_S)
        self.output += rest
        return self.process.returncode

    @property
    def runtime_info(self) -> dict[str, Any]:
        (path,) = self.runtime.glob("faasmoe/up-*/control.json")
        info: dict[str, Any] = json.loads(path.read_text())
        return info

    def request_control(self, path: str, body: object = None) -> Any:
        """Call the control API."""
        request = urllib.request.Request(
            self.runtime_info["control_url"] + path,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {self.runtime_info['token']}"},
        )
        with urllib.request.urlopen(request, timeout=DEADLINE_S) as response:
            content = response.read()
        return json.loads(content) if content else None

    def status(self) -> dict[str, Any]:
        """The status of the control process; empty while it does not respond."""
        try:
            status: dict[str, Any] = self.request_control("/v1/status")
        except OSError:
            return {}
        return status

    def ready_functions(self) -> set[str]:
        return {f["id"] for f in self.status().get("functions", []) if f["ready"] > 0}

    def sandbox_pids(self) -> set[int]:
        return {sandbox["pid"] for sandbox in self.status().get("sandboxes", [])}

    def activate_all(self) -> set[str]:
        functions = [function["id"] for function in self.status()["functions"]]
        self.request_control(
            "/v1/wake", {"router": "r", "sent_at_s": time.time(), "functions": functions}
        )
        return set(functions)

    def process_named(self, text: str) -> int:
        """Return the pid of the child process whose command line contains a text."""
        for pid in self.children():
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
            except OSError:
                continue
            if text in command and Path(f"/proc/{pid}/stat").read_text().split()[3] == str(
                self.process.pid
            ):
                return pid
        raise AssertionError(f"no process {text!r}")

    def router_pid(self) -> int:
        """Return the pid of the router, which its zygote has forked and named."""
        for pid in self.children():
            if Path(f"/proc/{pid}/comm").read_text().strip() == "fake_router":
                return pid
        raise AssertionError("no router")

    def children(self) -> list[int]:
        """Return the pids of all descendants."""
        descendants, parents = [], [self.process.pid]
        while parents:
            path = Path(f"/proc/{parents[0]}/task/{parents.pop(0)}/children")
            try:
                pids = [int(pid) for pid in path.read_text().split()]
            except OSError:  # the process has just exited
                continue
            descendants += pids
            parents += pids
        return descendants


@contextmanager
def running_up(
    model: Path | str, *arguments: str, **environment: str
) -> Iterator[UpWithFakeRouter]:
    words = [model] if isinstance(model, str) else ["-f", str(model)]
    port = str(free_port())
    with tempfile.TemporaryDirectory() as runtime:  # tmp_path is too long for a Unix socket
        process = subprocess.Popen(
            [*COMMAND, "up", *words, "--port", port, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "XDG_RUNTIME_DIR": runtime, **environment},
        )
        with process:
            try:
                yield UpWithFakeRouter(process, Path(runtime))
            finally:
                process.kill()


def is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def eventually(condition: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, f"timed out waiting for {what}"
        time.sleep(0.02)


def wait_for_end(pids: list[int]) -> None:
    eventually(lambda: not any(is_running(pid) for pid in pids), "the children to exit")


@pytest.fixture
def model(write_model: WriteModel, store: Path) -> Path:
    return write_model("granularity: {expertsPerFunction: 3}", "experts: {functionsPerSandbox: 3}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_stops_all_processes_and_removes_files(model: Path, number: signal.Signals) -> None:
    with running_up(model) as instance:
        instance.read_until("memory of all processes")
        assert "tiny is served by 6 functions, 0 of them active" in instance.output
        assert re.search(r"OpenAI base URL +http://127.0.0.1:\d+/v1", instance.output)
        assert f"control          {instance.runtime_info['control_url']}" in instance.output
        assert f"[router] control {instance.runtime_info['control_url']}" in instance.output
        eventually(lambda: len(instance.sandbox_pids()) == 1, "the pool")
        children = instance.children()
        assert (
            len(children) == 6
        )  # zygote, a generic sandbox, control, router and its zygote, gateway
        instance.process.send_signal(number)
        assert instance.wait_for_exit() == 0
        assert not any(is_running(pid) for pid in children)
        assert list(instance.runtime.glob("faasmoe/*")) == []


def test_secrets_are_private_and_absent_from_command_lines(model: Path) -> None:
    with running_up(model) as instance:
        instance.read_until("memory of all processes")
        (folder,) = instance.runtime.glob("faasmoe/up-*")
        assert folder.stat().st_mode & 0o777 == folder.parent.stat().st_mode & 0o777 == 0o700
        assert (folder / "control.json").stat().st_mode & 0o777 == 0o600
        assert (folder / "zygote.sock").stat().st_mode & 0o777 == 0o600
        token = instance.runtime_info["token"].encode()
        for pid in instance.children():
            assert token not in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_children_exit_when_launcher_is_killed(model: Path) -> None:
    with running_up(model) as instance:
        instance.read_until("memory of all processes")
        instance.activate_all()
        eventually(lambda: len(instance.ready_functions()) == 6, "all functions")
        children = instance.children()
        assert len(children) >= 6
        instance.process.kill()
        wait_for_end(children)


def test_functions_activate_on_request_and_scale_to_zero(
    write_model: WriteModel, store: Path
) -> None:
    scaling = "scaling: {windowSeconds: 6, panicWindowPercentage: 20, "
    file = write_model(
        "granularity: {expertsPerFunction: 3}",
        f"experts: {{warmPool: 0, {scaling} scaleToZeroGracePeriodSeconds: 0}}}}",
    )
    with running_up(file) as instance:
        instance.read_until("memory of all processes")
        assert instance.sandbox_pids() == set()
        functions = instance.activate_all()
        eventually(lambda: instance.ready_functions() == functions, "all functions")
        pids = instance.sandbox_pids()
        assert len(pids) == 6
        instance.request_control(
            "/v1/load",
            {
                "router": "r",
                "sent_at_s": time.time(),
                "interval_s": 1.0,
                "functions": {},
                "held": 0,
                "local": 0,
            },
        )
        eventually(lambda: instance.sandbox_pids() == set(), "scale to zero")
        wait_for_end(list(pids))
        instance.process.terminate()
        assert instance.wait_for_exit() == 0
    assert "functions: 6 of 6 up" in instance.output
    assert "functions: 0 of 6 up, 0 starting, 0 replicas; sandboxes: 0 ready" in instance.output


def test_killed_control_process_is_restarted_and_keeps_sandboxes(model: Path) -> None:
    with running_up(model) as instance:
        instance.read_until("memory of all processes")
        functions = instance.activate_all()
        eventually(lambda: instance.ready_functions() == functions, "all functions")
        eventually(lambda: instance.status()["pool"]["ready"] == 1, "the pool")
        before = instance.status()
        os.kill(instance.process_named("faasmoe_operator.control"), signal.SIGKILL)
        eventually(
            lambda: instance.status().get("epoch", before["epoch"]) != before["epoch"],
            "another control process",
        )
        after = instance.status()
        addresses = [{s["address"] for s in status["sandboxes"]} for status in (before, after)]
        assert addresses[0] == addresses[1]
        assert instance.ready_functions() == functions
        assert all(is_running(sandbox["pid"]) for sandbox in before["sandboxes"])
        instance.process.terminate()
        assert instance.wait_for_exit() == 0
    assert "the control process ended with status -9; restarting it" in instance.output


def test_killed_zygote_is_restarted_and_functions_reactivate(model: Path) -> None:
    with running_up(model) as instance:
        instance.read_until("memory of all processes")
        functions = instance.activate_all()
        eventually(lambda: instance.ready_functions() == functions, "all functions")
        pids = instance.sandbox_pids()
        os.kill(instance.process_named("zygote"), signal.SIGKILL)
        wait_for_end(list(pids))
        eventually(lambda: instance.ready_functions() == functions, "all functions again")
        assert not pids & instance.sandbox_pids()
        instance.process.terminate()
        assert instance.wait_for_exit() == 0
    assert "the zygote ended with status -9; restarting it" in instance.output


def test_interrupt_during_startup_exits_cleanly(model: Path) -> None:
    with running_up(model, FAKE_ROUTER_UNHEALTHY="1") as instance:
        instance.read_until("control listens")
        children = instance.children()
        instance.process.send_signal(signal.SIGINT)
        assert instance.wait_for_exit() == 130
        assert not any(is_running(pid) for pid in children)
    assert "Traceback" not in instance.output


@pytest.mark.parametrize("option", ["--gateway", "--no-gateway"])
def test_a_killed_router_is_restarted_and_its_port_goes_on_listening(
    model: Path, option: str
) -> None:
    with running_up(model, option) as instance:
        instance.read_until("OpenAI base URL")
        address = ("127.0.0.1", int(re.search(r"(\d+)/v1", instance.output)[1]))  # type: ignore[index]
        os.kill(instance.router_pid(), signal.SIGKILL)
        with socket.create_connection(address, timeout=DEADLINE_S) as client:  # at once
            client.sendall(b"GET /health HTTP/1.0\r\n\r\n")
            assert client.recv(100).split()[1] == b"200"
        instance.read_until("the router ended with status -9; restarting it")


def test_a_store_is_served_once(model: Path) -> None:
    with running_up(model) as instance:
        instance.read_until("OpenAI base URL")
        with running_up(model) as second:
            assert second.wait_for_exit() == 2
        assert "in use by another `faasmoe up` of the same store" in second.output


def test_reports_why_router_failed_to_start(model: Path) -> None:
    with running_up(model, FAKE_ROUTER_FAILS="1") as instance:
        assert instance.wait_for_exit() == 1
    assert "faasmoe: error: the router ended with status 1\n  the router has no model" in (
        instance.output
    )


def test_log_dir_receives_one_file_per_process(model: Path, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    with running_up(model, "--log-dir", str(logs)) as instance:
        instance.read_until("memory of all processes")
        eventually(lambda: len(instance.sandbox_pids()) == 1, "the pool")
        instance.process.terminate()
        assert instance.wait_for_exit() == 0
    assert "[router]" not in instance.output
    assert (logs / "router.log").read_text().startswith("control http://")
    assert "control listens on" in (logs / "control.log").read_text()
    assert "begins" in (logs / "sandboxes.log").read_text()


def test_top_finds_running_instance(model: Path) -> None:
    with running_up(model) as instance:
        instance.read_until("memory of all processes")
        functions = instance.activate_all()
        eventually(lambda: instance.ready_functions() == functions, "all functions")

        def shown() -> str:
            command = [sys.executable, "-m", "faasmoe_operator.cli", "top", "--once"]
            return subprocess.run(
                [*command, "-f", str(model)],
                env={**os.environ, "XDG_RUNTIME_DIR": str(instance.runtime)},
                capture_output=True,
                text=True,
                check=True,
            ).stdout

        eventually(lambda: shown().startswith("tiny: 6 functions (6 Active"), "6 active functions")
        assert len([line for line in shown().splitlines() if line[:12].isalnum()]) == 6


def test_rejects_missing_device_before_starting_processes(
    write_model: WriteModel, store: Path
) -> None:
    file = write_model("router: {device: cuda}", "experts: {device: cpu}")
    with running_up(file, CUDA_VISIBLE_DEVICES="") as instance:
        assert instance.wait_for_exit() == 2
    assert f"error: {file}: spec.router.device: got cuda, expected cpu or auto" in instance.output
    assert "verifying" not in instance.output
    assert "starting zygote" not in instance.output


def test_rejects_corrupted_store_without_announcing_that_it_serves(
    model: Path, store: Path
) -> None:
    (store / "layer1.safetensors").write_bytes(b"y")
    with running_up(model) as instance:
        assert instance.wait_for_exit() == 1
    assert "verifying 2 files of the store, 2 B" in instance.output
    assert re.search(r"error: \S+/layer1.safetensors: sha256: got \w+, expected", instance.output)
    assert "OpenAI base URL" not in instance.output
    assert "shutting down" in instance.output


def test_skip_verify_trusts_store(model: Path, store: Path) -> None:
    (store / "layer1.safetensors").write_bytes(b"y")
    with running_up(model, "--skip-verify") as instance:
        instance.read_until("memory of all processes")
        instance.process.terminate()
        assert instance.wait_for_exit() == 0
    assert "verifying" not in instance.output


def test_router_reads_tenants_from_private_file(write_model: WriteModel, store: Path) -> None:
    keys = store.parent / "keys" / "acme"
    keys.mkdir(parents=True)
    file = write_model("tenants: [{name: acme, apiKeysPath: keys/acme, weight: 2}]")
    with running_up(file) as instance:
        instance.read_until("memory of all processes")
        (written,) = instance.runtime.glob("faasmoe/up-*/tenants.json")
        assert written.stat().st_mode & 0o777 == 0o600
        instance.process.terminate()
        assert instance.wait_for_exit() == 0
    match = re.search(r"\[router\] tenants (.*)", instance.output)
    assert match
    (tenant,) = json.loads(match[1])["tenants"]
    assert (tenant["name"], tenant["keysPath"], tenant["weight"]) == ("acme", str(keys), 2)
    assert re.search(r"tenant +acme: http://127.0.0.1:\d+/acme/v1", instance.output)


def test_rejects_tenant_without_key_folder_before_starting_processes(
    write_model: WriteModel, store: Path
) -> None:
    with running_up(write_model("tenants: [{name: acme, apiKeysPath: keys/acme}]")) as instance:
        assert instance.wait_for_exit() == 2
    folder = store.parent / "keys" / "acme"
    assert f"spec.tenants.0.apiKeysPath: got {folder}, expected a folder with" in instance.output
    assert "starting zygote" not in instance.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "1Ki"], "--memory: got 1.0 KiB, expected 146.1 MiB or more"),
        (["--memory", "much"], "--memory: got 'much', expected a size such as 6Gi"),
        (["--gateways", "0"], "--gateways: got '0', expected 1 to 64"),
        (["--gateways", "2", "--max-model-len", "9"], "--max-model-len: got it with several"),
    ],
)
def test_rejects_what_does_not_go_with_several_models(
    model: Path, arguments: list[str], message: str
) -> None:
    with running_up(model, *arguments) as instance:
        assert instance.wait_for_exit() == 2
    assert message in instance.output
    assert "starting" not in instance.output


@pytest.mark.parametrize("option", [["--memory", "6Gi"], ["--gateways", "2"]])
def test_rejects_options_of_several_models_with_one_that_has_no_file(option: list[str]) -> None:
    with running_up("org/name", *option) as instance:
        assert instance.wait_for_exit() == 2
    assert f"{option[0]}: got MODEL, expected -f FILE" in instance.output


def test_warns_about_fields_without_effect(write_model: WriteModel, store: Path) -> None:
    with running_up(write_model("router: {replicas: 3}", "suspend: true")) as instance:
        instance.read_until("memory of all processes")
        instance.process.terminate()
        assert instance.wait_for_exit() == 0
    for field in ("spec.router.replicas", "spec.suspend"):
        note = f"faasmoe: {field}: has no effect here, only Kubernetes supports it"
        assert note in instance.output


def test_reports_failed_preparation(write_model: WriteModel) -> None:
    with running_up(write_model(source="file://missing")) as instance:
        assert instance.wait_for_exit() == 1
    (error,) = [line for line in instance.output.splitlines() if "error" in line]
    assert re.fullmatch(r"error: source: got 'file:///\S+missing', expected a folder .*", error)
    assert "Traceback" not in instance.output


def make_cached_store(store: Path, checkpoint: Path, cache: Path) -> CachedStore:
    """Make the store of a checkpoint in a user's cache folder, as `faasmoe prepare` leaves it."""
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        cached = CachedStore.of(
            ModelSource.parse(str(checkpoint)),
            revision=None,
            dtype=None,
            quantization=QuantizationEntry(),
        )
    cached.make_parent()
    shutil.copytree(store, cached.path)
    cached.write_stamp(cached.stamp())
    return cached


def test_serves_a_folder_without_a_file(store: Path, tmp_path: Path) -> None:
    cached = make_cached_store(store, tmp_path / "checkpoint", tmp_path / "cache")
    arguments = ("--experts-per-function", "3", "--api-key", "k", "--max-model-len", "32")
    with running_up(
        str(tmp_path / "checkpoint"), *arguments, XDG_CACHE_HOME=str(tmp_path / "cache")
    ) as instance:
        instance.read_until("memory of all processes")
        assert f"faasmoe: store: {cached.path}" in instance.output
        assert "checkpoint is served by 6 functions" in instance.output
        assert re.search(r"model +checkpoint$", instance.output, re.MULTILINE)
        (file,) = instance.runtime.glob("faasmoe/up-*/model.yaml")
        assert file.stat().st_mode & 0o777 == 0o600
        functions = instance.activate_all()
        eventually(lambda: instance.ready_functions() == functions, "all functions")
        # A layer has three functions, so three sandboxes hold those of both layers; one is ready.
        eventually(lambda: len(instance.sandbox_pids()) == 4, "three sandboxes and the pool")
        instance.process.terminate()
        assert instance.wait_for_exit() == 0


def test_options_override_a_file_for_all_processes(
    write_model: WriteModel, store: Path, tmp_path: Path
) -> None:
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "one").write_text("k")
    file = write_model(
        "granularity: {expertsPerFunction: 8}", "tenants: [{name: acme, apiKeysPath: keys}]"
    )
    with running_up(file, "--experts-per-function", "2", "--served-model-name", "x/y") as instance:
        instance.read_until("memory of all processes")
        assert "tiny is served by 8 functions" in instance.output
        assert re.search(r"model +x/y$", instance.output, re.MULTILINE)
        instance.process.terminate()
        assert instance.wait_for_exit() == 0
