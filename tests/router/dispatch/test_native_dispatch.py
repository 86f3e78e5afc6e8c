"""Layers over mailboxes: what runs natively, and what makes a layer take the general path."""

from __future__ import annotations

import http.client
import json
import mmap
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from faasmoe_up import free_port
from metric_samples import parse_sample
from raw_http import wait_until
from sandbox_processes import PreparedStore, SandboxProcess, StartSandbox, make_function_spec

from faasmoe_contracts.routing_table import FunctionEndpoints, RoutingTable
from faasmoe_contracts.store import Store
from faasmoe_contracts.unix_socket import unix_socket_path
from faasmoe_kernels import KernelsUnavailable, load
from faasmoe_router.dispatch import Dispatcher, takeover
from faasmoe_router.dispatch.cold_start import ActivationSettings
from faasmoe_router.dispatch.endpoint_health import EndpointHealth, ResilienceSettings
from faasmoe_router.dispatch.fanout import DispatchTimeouts
from faasmoe_router.dispatch.metrics import DispatchMetrics
from faasmoe_router.dispatch.native_dispatch import MAX_NATIVE_ROWS

DEADLINE_S = 120.0
LONG_DRAIN_S = 600.0
TOKEN = "a-token"
LAYER = 0
BUSY, DONE, ABANDONED = 2, 3, 4


@pytest.fixture(scope="module", autouse=True)
def _native() -> None:
    try:
        load()
    except KernelsUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def store(prepared_store: PreparedStore) -> Store:
    """Three MoE layers of 8 experts, hidden size 32, float32."""
    return prepared_store("mixtral")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("s")


@pytest.fixture
def sandbox_server(sandbox: StartSandbox, folder: Path) -> Iterator[SandboxProcess]:
    """A sandbox that drains until its last client has left: request it before `router`."""
    with sandbox(capacity=64, token=TOKEN, socket_dir=folder, drain_s=DEADLINE_S) as process:
        yield process


class Router:
    """A dispatcher, and inputs for one of its layers."""

    def __init__(self, store: Store, table: RoutingTable, folder: Path, **options: Any) -> None:
        self.metrics = DispatchMetrics()
        options = {"token": TOKEN, "socket_dir": folder, **options}
        self.dispatcher = Dispatcher(store, table, metrics=self.metrics, **options)
        self.general = Dispatcher(store, table, mailbox=False, **options)

    def wait_for_mailboxes(self, *addresses: str) -> None:
        assert self.dispatcher.native is not None
        assert self.dispatcher.native.connector.wait_until_open(addresses, DEADLINE_S)

    @staticmethod
    def arguments(n_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(n_rows)
        return (
            torch.randn(n_rows, 32, generator=generator),
            torch.rand(n_rows, 8, generator=generator).topk(2).indices,
            torch.rand(n_rows, 2, generator=generator),
        )

    def check(self, n_rows: int = 3, layer: int = LAYER) -> None:
        """Compute a batch, and compare it with the general path."""
        arguments = self.arguments(n_rows)
        output = self.dispatcher.compute(layer, *arguments)
        torch.testing.assert_close(output, self.general.compute(layer, *arguments))

    def count(self, name: str) -> float:
        if self.dispatcher.native is not None:
            self.dispatcher.native.settle_before(LAYER + 1)  # which most tests do not compute
        return self.count_collected(name)

    def count_collected(self, name: str) -> float:
        return float(getattr(self.metrics, name).collect()[0].samples[0].value)

    def counts_native(self, n_layers: int = 1) -> float:
        """Compute some layers; return the calls over mailboxes."""
        before = self.count("mailbox_calls")
        for _ in range(n_layers):
            self.check()
        return self.count("mailbox_calls") - before


@pytest.fixture
def router(store: Store, folder: Path) -> Iterator[Callable[..., Router]]:
    made: list[Router] = []

    def make(table: RoutingTable, **options: Any) -> Router:
        made.append(Router(store, table, folder, **options))
        return made[-1]

    yield make
    for one in made:
        one.dispatcher.close()
        one.general.close()


MakeRouter = Callable[..., Router]


def test_layer_is_one_frame_per_sandbox(
    sandbox_server: SandboxProcess, router: MakeRouter, store: Store
) -> None:
    table = sandbox_server.attach_blocks(store, 3)
    one = router(table)
    one.wait_for_mailboxes(sandbox_server.address)
    for n_rows in (1, 16, 65, MAX_NATIVE_ROWS):
        for layer in range(3):
            one.check(n_rows, layer)
    assert one.count("mailbox_calls") == one.count("calls") == 12
    assert one.count("failed_calls") == one.count("local") == 0
    for _ in range(2):
        one.check(MAX_NATIVE_ROWS + 1)  # larger batches take the general path
    assert one.count("mailbox_calls") == 12


def test_calls_before_a_layer_on_the_general_path_are_collected_with_it(
    sandbox_server: SandboxProcess, router: MakeRouter, store: Store
) -> None:
    one = router(sandbox_server.attach_blocks(store, 8))
    one.wait_for_mailboxes(sandbox_server.address)
    one.check(1)
    one.dispatcher.compute_general(LAYER + 1, *one.arguments(1))
    assert one.count_collected("mailbox_calls") == 1


def test_calls_count_in_load_and_in_the_sandboxs_metrics(
    sandbox_server: SandboxProcess, router: MakeRouter, store: Store
) -> None:
    one = router(sandbox_server.attach_blocks(store, 8))
    one.wait_for_mailboxes(sandbox_server.address)
    assert one.counts_native(4) == 4
    load = one.dispatcher.load
    totals = {name: t for name, t in load.snapshot(time.monotonic()).items() if t.calls}
    (total,) = totals.values()
    assert (total.calls, total.rows) == (4, 12)
    assert 0 < total.in_flight_s < DEADLINE_S
    assert load.forward_passes == 4
    assert one.count("sent_bytes") > 4 * 3 * 32 * 4
    metrics = sandbox_server.http.get("/metrics").text
    # The general path computed the same.
    assert parse_sample(metrics, "faasmoe_expert_frames_total") == 8
    assert parse_sample(metrics, "faasmoe_expert_mailbox_frames_total") == 4
    assert parse_sample(metrics, "faasmoe_expert_rows_total") == 24
    assert parse_sample(metrics, "faasmoe_expert_compute_seconds_count") == 8
    functions = sandbox_server.http.get("/v1/functions").json()["functions"]
    assert sorted(f["frames"] for f in functions) == [0, 0, 8]


def test_switch_leaves_calls_to_http(
    router: MakeRouter, sandbox: StartSandbox, store: Store, folder: Path
) -> None:
    with sandbox(capacity=8, token=TOKEN, socket_dir=folder, mailbox="off") as process:
        one = router(process.attach_blocks(store, 8))
        one.check()
        response = process.http.put("/v1/mailbox", json={"descriptor": 0, "size_bytes": 4096})
        assert response.status_code == 409
        assert response.json()["error"]["code"] == "mailbox_refused"
        assert one.counts_native(2) == one.count("failed_calls") == 0


def test_detached_function_is_called_over_http_and_natively_again_once_attached(
    sandbox_server: SandboxProcess, router: MakeRouter, store: Store
) -> None:
    spec = make_function_spec(store, [LAYER], range(8))
    others = [make_function_spec(store, [layer], range(8)) for layer in (1, 2)]
    entries = tuple(sandbox_server.attach(store, s) for s in (spec, *others))
    one = router(RoutingTable(store.manifest.digest, 0, entries))
    one.wait_for_mailboxes(sandbox_server.address)
    assert one.counts_native() == 1
    assert sandbox_server.http.delete(f"/v1/functions/{spec.id}").status_code == 204
    one.check()
    one.check()
    assert one.count("local") == 2
    sandbox_server.attach(store, spec)
    wait_until(lambda: one.counts_native() == 1)


def test_functions_detached_while_they_compute(
    sandbox_server: SandboxProcess, router: MakeRouter, store: Store
) -> None:
    one = router(sandbox_server.attach_blocks(store, 8))
    one.wait_for_mailboxes(sandbox_server.address)
    spec = make_function_spec(store, [LAYER], range(8))
    stop = threading.Event()

    def attach_and_detach() -> None:
        while not stop.is_set():
            sandbox_server.http.delete(f"/v1/functions/{spec.id}")
            sandbox_server.attach(store, spec)

    thread = threading.Thread(target=attach_and_detach)
    thread.start()
    for n_rows in range(1, 60):
        one.check(n_rows)
    stop.set()
    thread.join()
    assert sandbox_server.process.poll() is None


def test_changed_store_is_verified_over_http_before_it_is_used_natively(
    sandbox_server: SandboxProcess, router: MakeRouter, store: Store
) -> None:
    one = router(sandbox_server.attach_blocks(store, 8))
    one.wait_for_mailboxes(sandbox_server.address)
    assert one.counts_native() == 1
    os.utime(store.path / store.manifest.layers[LAYER].file)
    # The answer of the mailbox is given up, and HTTP verifies the file.
    assert one.counts_native(2) == 2
    metrics = sandbox_server.http.get("/metrics").text
    assert parse_sample(metrics, "faasmoe_expert_mailbox_frames_total") == 2


def test_truncated_store_ends_no_sandbox_and_reaches_no_answer(
    sandbox_server: SandboxProcess, router: MakeRouter, store: Store, tmp_path: Path
) -> None:
    copied = Store.open(shutil.copytree(store.path, tmp_path / "store"))
    one = router(sandbox_server.attach_blocks(copied, 8))
    one.wait_for_mailboxes(sandbox_server.address)
    assert one.counts_native() == 1
    layer_file = copied.path / copied.layer_entry(LAYER).file
    os.truncate(layer_file, 4096)
    one.check()  # what the sandbox cannot read is computed from the router's own store
    assert sandbox_server.process.poll() is None
    shutil.copyfile(store.path / store.layer_entry(LAYER).file, layer_file)
    wait_until(lambda: one.counts_native() == 1)


def test_draining_sandbox_declines(
    sandbox_server: SandboxProcess, router: MakeRouter, store: Store
) -> None:
    one = router(sandbox_server.attach_blocks(store, 8))
    one.wait_for_mailboxes(sandbox_server.address)
    assert one.counts_native() == 1
    sandbox_server.process.terminate()
    wait_until(lambda: sandbox_server.http.get("/readyz").status_code == 503)
    assert one.counts_native() == 0


def test_draining_sandbox_does_not_wait_for_its_mailboxes(
    sandbox: StartSandbox, router: MakeRouter, store: Store, folder: Path
) -> None:
    with sandbox(capacity=8, token=TOKEN, socket_dir=folder, drain_s=LONG_DRAIN_S) as process:
        one = router(process.attach_blocks(store, 8))
        one.wait_for_mailboxes(process.address)
        process.http.close()
        process.process.terminate()
        assert process.process.wait(DEADLINE_S) == 0
        one.check()
        assert one.count("local") == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_layer_in_flight_survives_its_sandbox(
    sandbox_server: SandboxProcess, router: MakeRouter, store: Store, number: signal.Signals
) -> None:
    timeouts = DispatchTimeouts(0.5, 0.5, 5.0)
    one = router(sandbox_server.attach_blocks(store, 8), timeouts=timeouts)
    one.wait_for_mailboxes(sandbox_server.address)
    assert one.counts_native(3) == 3
    os.kill(sandbox_server.process.pid, number)
    wait_until(lambda: process_state(sandbox_server.process.pid) in "TZ")
    try:
        one.check()
        assert one.count("local") == 1
    finally:
        os.kill(sandbox_server.process.pid, signal.SIGCONT)


def test_stopped_sandbox_is_noticed_and_not_called_over_http(
    sandbox_server: SandboxProcess, router: MakeRouter, store: Store
) -> None:
    one = router(sandbox_server.attach_blocks(store, 8))
    one.wait_for_mailboxes(sandbox_server.address)
    arguments = one.arguments(3)
    expected = one.dispatcher.compute(LAYER, *arguments)
    n_calls = one.count("calls")
    os.kill(sandbox_server.process.pid, signal.SIGSTOP)
    wait_until(lambda: process_state(sandbox_server.process.pid) == "T")
    try:
        torch.testing.assert_close(one.dispatcher.compute(LAYER, *arguments), expected)
        assert one.count("calls") == n_calls + 1  # the one in the mailbox
        assert one.count("local") == one.count("ejected") == 1
    finally:
        os.kill(sandbox_server.process.pid, signal.SIGCONT)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_functions_of_a_lost_sandbox_go_on_natively_beside_the_others(
    sandbox_server: SandboxProcess, router: MakeRouter, sandbox: StartSandbox, store: Store,
    folder: Path, number: signal.Signals,
) -> None:  # fmt: skip
    with sandbox(capacity=64, token=TOKEN, socket_dir=folder) as other:
        kept, lost = sandbox_server.attach_blocks(store, 3), other.attach_blocks(store, 3)
        entries = tuple(
            (kept, lost)[i % 2].functions[i] for i in range(len(kept.functions))
        )  # each layer has functions of both
        one = router(replace(kept, functions=entries))
        one.wait_for_mailboxes(sandbox_server.address, other.address)
        one.check(16)
        os.kill(other.process.pid, number)
        wait_until(lambda: process_state(other.process.pid) in "TZ")
        try:
            one.check(16)  # finds out, maps what is lost, and computes the layer again
            n_lost, n_mailbox = one.count("local"), one.count("mailbox_calls")
            assert n_lost > 0
            assert one.count("calls") == n_mailbox  # nothing over HTTP
            assert one.count("ejected") == 1
            one.check(16)
            assert one.count("mailbox_calls") == n_mailbox + 1  # the other sandbox's
            assert one.count("local") == one.dispatcher.load.local_calls == 2 * n_lost
            assert one.count("colocated") == 0
        finally:
            os.kill(other.process.pid, signal.SIGCONT)


def test_layers_after_the_one_that_lost_a_sandbox_stay_native(
    sandbox_server: SandboxProcess, router: MakeRouter, sandbox: StartSandbox, store: Store,
    folder: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(takeover, "MAP_BUDGET_S", DEADLINE_S)
    with sandbox(capacity=64, token=TOKEN, socket_dir=folder) as other:
        kept, lost = sandbox_server.attach_blocks(store, 3), other.attach_blocks(store, 3)
        entries = tuple((kept, lost)[i % 2].functions[i] for i in range(len(kept.functions)))
        one = router(replace(kept, functions=entries))
        one.wait_for_mailboxes(sandbox_server.address, other.address)
        one.check(16)
        os.kill(other.process.pid, signal.SIGKILL)
        wait_until(lambda: process_state(other.process.pid) == "Z")
        one.check(16)  # finds out; the pass goes on with the other layers
        n_mailbox = one.count("mailbox_calls")
        for number, layer in enumerate(range(LAYER + 1, len(store.manifest.layers)), start=1):
            one.check(16, layer)
            assert one.count("mailbox_calls") == n_mailbox + number


@contextmanager
def unanswered(folder: Path) -> Iterator[str]:
    """Yield the address of a sandbox whose mailbox is being opened for two seconds."""
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as listener:
        port = tcp.getsockname()[1]
        listener.bind(str(unix_socket_path(folder, port)))
        listener.listen()
        yield f"127.0.0.1:{port}"


def test_function_goes_on_natively_until_its_replacements_mailbox_is_open(
    sandbox: StartSandbox, router: MakeRouter, store: Store, folder: Path
) -> None:
    activation = ActivationSettings(lambda names: None)
    with sandbox(capacity=8, token=TOKEN, socket_dir=folder) as lost:
        table = lost.attach_blocks(store, 8)
        one = router(table, activation=activation)
        one.wait_for_mailboxes(lost.address)
        one.check()
        arguments = one.arguments(3)
        expected = one.general.compute(LAYER + 1, *arguments)
        os.kill(lost.process.pid, signal.SIGKILL)
        wait_until(lambda: process_state(lost.process.pid) == "Z")
        with unanswered(folder) as address:
            entries = tuple(replace(f, addresses=(address,)) for f in table.functions)
            one.dispatcher.replace_table(replace(table, version=1, functions=entries))
            output = one.dispatcher.compute(LAYER + 1, *arguments)  # within the pass
            torch.testing.assert_close(output, expected)
            assert one.count("local") == 1
            assert one.count("calls") == one.count("mailbox_calls") == 1


def test_functions_that_have_lost_their_address_between_passes_go_on_natively(
    sandbox_server: SandboxProcess, router: MakeRouter, sandbox: StartSandbox, store: Store,
    folder: Path,
) -> None:  # fmt: skip
    activation = ActivationSettings(lambda names: None)
    with sandbox(capacity=64, token=TOKEN, socket_dir=folder) as other:
        kept, lost = sandbox_server.attach_blocks(store, 3), other.attach_blocks(store, 3)
        entries = tuple((kept, lost)[i % 2].functions[i] for i in range(len(kept.functions)))
        one = router(replace(kept, functions=entries), activation=activation)
        one.wait_for_mailboxes(sandbox_server.address, other.address)
        one.check(16)
        left = tuple(
            replace(f, addresses=()) if f.addresses == (other.address,) else f for f in entries
        )
        one.dispatcher.replace_table(replace(kept, version=1, functions=left))
        one.check(16)
        assert one.count("local") > 0
        assert one.count("calls") == one.count("mailbox_calls") == 3


def test_layer_of_a_running_pass_takes_new_routes(
    sandbox_server: SandboxProcess, router: MakeRouter, sandbox: StartSandbox, store: Store,
    folder: Path,
) -> None:  # fmt: skip
    with sandbox(capacity=64, token=TOKEN, socket_dir=folder) as other:
        before, after = sandbox_server.attach_blocks(store, 8), other.attach_blocks(store, 8)
        one = router(before)
        one.wait_for_mailboxes(sandbox_server.address)
        one.check()
        one.dispatcher.replace_table(replace(after, version=1))
        one.wait_for_mailboxes(other.address)
        one.check(layer=LAYER + 1)
        assert one.count("calls") == one.count("mailbox_calls") == 2


def test_replica_whose_mailbox_is_being_opened_keeps_no_layer_from_the_native_path(
    sandbox_server: SandboxProcess, router: MakeRouter, store: Store, folder: Path
) -> None:
    table = sandbox_server.attach_blocks(store, 8)
    one = router(table)
    one.wait_for_mailboxes(sandbox_server.address)
    with unanswered(folder) as address:
        addresses = (sandbox_server.address, address)
        entries = tuple(replace(f, addresses=addresses) for f in table.functions)
        one.dispatcher.replace_table(replace(table, version=1, functions=entries))
        assert one.counts_native() == 1


def process_state(pid: int) -> str:
    """Return the state of a process: T if it is stopped, Z once it has exited."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_batch_with_many_rows_of_an_expert_is_declined_once(
    sandbox_server: SandboxProcess, router: MakeRouter, store: Store
) -> None:
    one = router(sandbox_server.attach_blocks(store, 8))
    one.wait_for_mailboxes(sandbox_server.address)
    hidden, index, weight = torch.ones(32, 32), torch.zeros(32, 1).long(), torch.ones(32, 1)
    calls = []
    for _ in range(4):
        output = one.dispatcher.compute(LAYER, hidden, index, weight)
        torch.testing.assert_close(output, one.general.compute(LAYER, hidden, index, weight))
        calls.append(one.count("mailbox_calls"))
    # Where torch's products are not faster for many rows, nothing is declined.
    assert calls in ([1, 1, 1, 1], [1, 2, 3, 4])
    assert one.count("failed_calls") == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_restarted_sandbox_gets_a_new_mailbox(
    router: MakeRouter, sandbox: StartSandbox, store: Store, folder: Path, number: int
) -> None:
    port = free_port()
    with sandbox(capacity=8, token=TOKEN, socket_dir=folder, port=port) as process:
        table = process.attach_blocks(store, 8)
        one = router(table)
        one.wait_for_mailboxes(process.address)
        assert one.counts_native() == 1
        process.process.send_signal(number)
        process.process.wait()
    one.check()
    with sandbox(capacity=8, token=TOKEN, socket_dir=folder, port=port) as process:
        process.attach_blocks(store, 8)
        wait_until(lambda: one.counts_native() == 1)


@pytest.mark.parametrize("n_rows", [1, 5])
def test_replicas_share_the_calls(
    sandbox_server: SandboxProcess, router: MakeRouter, sandbox: StartSandbox, store: Store,
    folder: Path, n_rows: int,
) -> None:  # fmt: skip
    with sandbox(capacity=64, token=TOKEN, socket_dir=folder) as other:
        processes = (sandbox_server, other)
        tables = [process.attach_blocks(store, 8) for process in processes]
        addresses = tuple(process.address for process in processes)
        entries = tuple(replace(f, addresses=addresses) for f in tables[0].functions)
        one = router(replace(tables[0], functions=entries))
        one.wait_for_mailboxes(*addresses)
        for _ in range(8):
            one.check(n_rows)
        for process in processes:
            metrics = process.http.get("/metrics").text
            assert parse_sample(metrics, "faasmoe_expert_mailbox_frames_total") == 4


class Closed(Exception):
    """Raised by an answer: the connection of the mailbox is closed."""


Listen = Callable[[Path], socket.socket]


def listening(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    return listener


class LyingSandbox:
    """Accepts one mailbox and answers its frames with what the test writes."""

    def __init__(
        self, folder: Path, answer: Callable[[mmap.mmap, int], None], listen: Listen = listening
    ) -> None:
        self._tcp = socket.create_server(("127.0.0.1", 0))  # never answers
        port = self._tcp.getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        self._listener = listen(unix_socket_path(folder, port))
        self._answer = answer
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        with connection, connection.makefile("rb") as reader:
            assert reader.readline().startswith(b"PUT /v1/mailbox")
            headers = http.client.parse_headers(reader)
            offer = json.loads(reader.read(int(headers["content-length"])))
            descriptor = os.dup(offer["descriptor"])  # of this process
            memory = mmap.mmap(descriptor, offer["size_bytes"])
            os.close(descriptor)
            struct.pack_into("<I", memory, 192, 1)  # serving
            connection.sendall(b"HTTP/1.1 201 Created\r\ncontent-length: 0\r\n\r\n")
            with suppress(Closed):
                self._answer_all(memory)

    def _answer_all(self, memory: mmap.mmap) -> None:
        while not self._stop.is_set():
            for slot in (4096, 5120):
                if struct.unpack_from("<I", memory, slot)[0] == 1:
                    self._answer(memory, slot)
            self._stop.wait(0.001)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._listener.close()
        self._tcp.close()


def zeros_with_a_wrong_checksum(memory: mmap.mmap, slot: int) -> None:
    (sequence, request_bytes) = struct.unpack_from("<II", memory, slot + 8)
    frames = 4096 * 2
    header = bytearray(memory[frames : frames + 32])
    n_rows = struct.unpack_from("<I", header, 12)[0]
    header[5] = 2
    struct.pack_into("<II", header, 24, n_rows * 32 * 4, 12345)
    (request_area, response_area) = struct.unpack_from("<II", memory, 12)
    assert request_bytes <= request_area
    memory[frames + request_area : frames + request_area + 32] = bytes(header)
    response_bytes = 32 + n_rows * 32 * 4
    assert response_bytes <= response_area
    struct.pack_into("<IIII", memory, slot + 576, sequence, 0, response_bytes, 0)
    struct.pack_into("<I", memory, slot, DONE)


def answer_to_another_request(memory: mmap.mmap, slot: int) -> None:
    struct.pack_into("<IIII", memory, slot + 576, 4242, 0, 64, 0)
    struct.pack_into("<I", memory, slot, DONE)


def impossible_state(memory: mmap.mmap, slot: int) -> None:
    struct.pack_into("<I", memory, slot, 77)


def impossible_size(memory: mmap.mmap, slot: int) -> None:
    (sequence,) = struct.unpack_from("<I", memory, slot + 8)
    struct.pack_into("<IIII", memory, slot + 576, sequence, 0, 0xFFFFFFFF, 0)
    struct.pack_into("<I", memory, slot, DONE)


def sudden_end(memory: mmap.mmap, slot: int) -> None:
    raise Closed


def silence(memory: mmap.mmap, slot: int) -> None:
    """Leave a frame as if its computation had begun."""
    struct.pack_into("<I", memory, slot, BUSY)


def nothing(memory: mmap.mmap, slot: int) -> None:
    """Leave a frame as it is."""


def announced_end(memory: mmap.mmap, slot: int) -> None:
    struct.pack_into("<I", memory, 192, 2)  # draining
    raise Closed


LISTENER = """
import socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
socket.send_fds(socket.socket(fileno=int(sys.argv[2])), [b"."], [listener.fileno()])
sys.stdin.read()
"""


@contextmanager
def lying(
    folder: Path, answer: Callable[[mmap.mmap, int], None], listen: Listen = listening
) -> Iterator[LyingSandbox]:
    sandbox = LyingSandbox(folder, answer, listen)
    try:
        yield sandbox
    finally:
        sandbox.close()


@pytest.mark.parametrize(
    "answer",
    [zeros_with_a_wrong_checksum, answer_to_another_request, impossible_state, impossible_size],
)
def test_garbage_in_a_mailbox_ends_it_and_counts_as_an_error(
    router: MakeRouter, store: Store, folder: Path, caplog: pytest.LogCaptureFixture,
    answer: Callable[[mmap.mmap, int], None],
) -> None:  # fmt: skip
    with lying(folder, answer) as sandbox:
        specs = [make_function_spec(store, [layer], range(8)) for layer in range(3)]
        entries = tuple(FunctionEndpoints(spec, (sandbox.address,)) for spec in specs)
        timeouts = DispatchTimeouts(0.2, 0.2, 0.5)
        one = router(RoutingTable(store.manifest.digest, 0, entries), timeouts=timeouts)
        one.wait_for_mailboxes(sandbox.address)
        one.check()
        assert one.count("local") == 1
        assert one.count("mailbox_calls") == 1
        assert "bad response frame in the mailbox" in caplog.text
        assert one.dispatcher.native is not None
        assert not one.dispatcher.native.connector.mailboxes()


@pytest.mark.parametrize(("end", "n_ejected"), [(sudden_end, 1), (announced_end, 0)])
def test_sandbox_that_closes_a_mailbox_unannounced_is_ejected_at_once(
    router: MakeRouter, store: Store, folder: Path, end: Callable[[mmap.mmap, int], None],
    n_ejected: int,
) -> None:  # fmt: skip
    with lying(folder, end) as sandbox:
        specs = [make_function_spec(store, [layer], range(8)) for layer in range(3)]
        entries = tuple(FunctionEndpoints(spec, (sandbox.address,)) for spec in specs)
        timeouts = DispatchTimeouts(0.2, 0.2, 0.5)
        one = router(RoutingTable(store.manifest.digest, 0, entries), timeouts=timeouts)
        one.wait_for_mailboxes(sandbox.address)
        one.check()
        assert one.count("local") == 1
        assert one.count("ejected") == n_ejected
        assert one.count("calls") == 2 - n_ejected  # over HTTP, too, unless it is ejected


@pytest.mark.parametrize("answer", [silence, nothing, sudden_end])
def test_what_a_replica_does_not_answer_is_sent_natively_to_another_one_only(
    sandbox_server: SandboxProcess, router: MakeRouter, sandbox: StartSandbox, store: Store,
    folder: Path, answer: Callable[[mmap.mmap, int], None],
) -> None:  # fmt: skip
    with (
        sandbox(capacity=64, token=TOKEN, socket_dir=folder) as other,
        lying(folder, answer) as silent,
    ):
        single, replicated = sandbox_server.attach_blocks(store, 3), other.attach_blocks(store, 3)
        entries = tuple(
            replace(f, addresses=(*f.addresses, silent.address)) if i % 2 else single.functions[i]
            for i, f in enumerate(replicated.functions)
        )  # each layer has functions of both
        timeouts = DispatchTimeouts(0.2, 0.2, 5.0)
        one = router(replace(single, functions=entries), timeouts=timeouts)
        one.wait_for_mailboxes(sandbox_server.address, other.address, silent.address)
        reference = router(single)
        n_passes = 0
        while not one.count("failed_calls"):  # until the silent one is picked
            for layer in range(len(store.manifest.layers)):
                arguments = one.arguments(16)
                output = one.dispatcher.compute(layer, *arguments)
                torch.testing.assert_close(output, reference.general.compute(layer, *arguments))
            n_passes += 1
        n_layers = n_passes * len(store.manifest.layers)
        assert one.count("calls") == one.count("mailbox_calls") == 2 * n_layers + 1
        assert one.count("local") == 0
        metrics = sandbox_server.http.get("/metrics").text  # its answers were kept
        assert parse_sample(metrics, "faasmoe_expert_mailbox_frames_total") == n_layers


def test_layer_goes_over_http_where_no_other_replica_answers_either(
    sandbox_server: SandboxProcess, router: MakeRouter, store: Store, folder: Path
) -> None:
    with lying(folder, silence) as first, lying(folder, silence) as second:
        table = sandbox_server.attach_blocks(store, 8)
        addresses = (first.address, second.address)
        entries = tuple(replace(f, addresses=addresses) for f in table.functions)
        timeouts = DispatchTimeouts(0.2, 0.2, 0.5)
        one = router(replace(table, functions=entries), timeouts=timeouts)
        one.wait_for_mailboxes(*addresses)
        one.check()
        assert one.count("mailbox_calls") == 2
        assert one.count("local") == 1


def test_answers_of_replicas_that_are_all_late_are_waited_for(
    sandbox_server: SandboxProcess, router: MakeRouter, sandbox: StartSandbox, store: Store,
    folder: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(EndpointHealth, "latency_thresholds_s", lambda *_: (0.0, 0.2))
    with (
        sandbox(capacity=64, token=TOKEN, socket_dir=folder) as other,
        lying(folder, silence) as silent,
    ):
        first, second = sandbox_server.attach_blocks(store, 3), other.attach_blocks(store, 3)
        others = (other.address, silent.address)
        entries = tuple(
            replace(f, addresses=(*f.addresses, others[i % 2]))
            for i, f in enumerate(first.functions)
        )  # some of what the first one computes can be sent elsewhere
        settings = ResilienceSettings(retry_budget_ratio=1.0, retry_budget_burst=1e6)
        one = router(replace(first, functions=entries), resilience=settings)
        one.wait_for_mailboxes(sandbox_server.address, *others)
        reference = router(second)
        arguments = one.arguments(16)
        for layer in range(len(store.manifest.layers)):  # the silent one is found out
            one.dispatcher.compute(layer, *arguments)
        n_http = one.count("calls") - one.count("mailbox_calls")
        for _ in range(8):
            for layer in range(len(store.manifest.layers)):
                output = one.dispatcher.compute(layer, *arguments)
                torch.testing.assert_close(output, reference.general.compute(layer, *arguments))
        assert one.count("hedges") > 0
        assert one.count("calls") - one.count("mailbox_calls") == n_http
        assert one.count("local") == 0


def test_sandbox_that_ends_is_noticed_before_its_connections_are_closed(
    router: MakeRouter, store: Store, folder: Path
) -> None:
    children: list[subprocess.Popen[bytes]] = []

    def listen(path: Path) -> socket.socket:
        """Listen as another process, which ends with the first frame."""
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-c", LISTENER, str(path), str(theirs.fileno())]
        with ours, theirs:
            children.append(subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=-1))
            _, (descriptor,), _, _ = socket.recv_fds(ours, 1, 1)
        return socket.socket(fileno=descriptor)

    def end(memory: mmap.mmap, slot: int) -> None:
        silence(memory, slot)
        assert children[0].stdin is not None
        children[0].stdin.close()

    with lying(folder, end, listen) as sandbox:
        specs = [make_function_spec(store, [layer], range(8)) for layer in range(3)]
        entries = tuple(FunctionEndpoints(spec, (sandbox.address,)) for spec in specs)
        one = router(RoutingTable(store.manifest.digest, 0, entries))
        one.wait_for_mailboxes(sandbox.address)
        one.dispatcher.compute(LAYER, *one.arguments(3))
        assert process_state(children[0].pid) == "Z"
        assert one.count("local") == one.count("ejected") == 1
        assert one.count("calls") == 1
        children[0].wait()
