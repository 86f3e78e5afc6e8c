"""One sandbox for the tests of a module."""

import socket
from collections.abc import Callable, Iterator

import pytest
from rawhttp import DEADLINE_S, TIMEOUT_S, TOKEN, frame
from sandboxes import OpenSandbox, PreparedStore, SandboxProcess, spec_of

from faasmoe_expert.store import Store
from faasmoe_expert.table import FunctionSpec


@pytest.fixture(scope="session")
def store(prepared_store: PreparedStore) -> Store:
    """Three MoE layers of 8 experts, hidden size 32, float32."""
    return prepared_store("mixtral")


@pytest.fixture(scope="session")
def spec(store: Store) -> FunctionSpec:
    return spec_of(store, [0], [0, 1, 2])


@pytest.fixture(scope="module")
def box(sandbox: OpenSandbox, store: Store, spec: FunctionSpec) -> Iterator[SandboxProcess]:
    """A sandbox with one function attached; it must be alive and well after each module."""
    settings = {"capacity": 4, "request_timeout_s": TIMEOUT_S}
    with sandbox(token=TOKEN, **settings) as box:
        box.attach(store, spec)
        yield box
        assert box.process.poll() is None
        assert "Traceback" not in box.log.read_text()


@pytest.fixture
def connect(box: SandboxProcess) -> Iterator[Callable[[], socket.socket]]:
    """Opens raw connections to the sandbox."""
    opened: list[socket.socket] = []

    def connect() -> socket.socket:
        host, port = box.address.split(":")
        opened.append(socket.create_connection((host, int(port)), timeout=DEADLINE_S))
        return opened[-1]

    yield connect
    for connection in opened:
        connection.close()


@pytest.fixture(autouse=True)
def sandbox_serves_on(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test that used the shared sandbox, the sandbox still computes."""
    yield
    if "box" in request.fixturenames:
        box: SandboxProcess = request.getfixturevalue("box")
        spec: FunctionSpec = request.getfixturevalue("spec")
        answer = box.http.post(f"/v1/functions/{spec.id}", content=frame())
        assert answer.status_code == 200, answer.text
