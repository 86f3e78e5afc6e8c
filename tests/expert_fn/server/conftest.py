"""A sandbox process shared by the tests of a module."""

import socket
from collections.abc import Callable, Iterator

import pytest
from raw_http import DEADLINE_S, TIMEOUT_S, TOKEN, request_frame
from sandbox_processes import PreparedStore, SandboxProcess, StartSandbox, make_function_spec

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_contracts.store import Store


@pytest.fixture(scope="session")
def store(prepared_store: PreparedStore) -> Store:
    """Three MoE layers of 8 experts, hidden size 32, float32."""
    return prepared_store("mixtral")


@pytest.fixture(scope="session")
def spec(store: Store) -> FunctionSpec:
    return make_function_spec(store, [0], [0, 1, 2])


@pytest.fixture(scope="module")
def sandbox_server(
    sandbox: StartSandbox, store: Store, spec: FunctionSpec
) -> Iterator[SandboxProcess]:
    """A sandbox with one attached function; checks that it survives the module's tests."""
    settings = {"capacity": 4, "request_timeout_s": TIMEOUT_S}
    with sandbox(token=TOKEN, **settings) as sandbox_server:
        sandbox_server.attach(store, spec)
        yield sandbox_server
        assert sandbox_server.process.poll() is None
        assert "Traceback" not in sandbox_server.log.read_text()


@pytest.fixture
def connect(sandbox_server: SandboxProcess) -> Iterator[Callable[[], socket.socket]]:
    """Factory of raw connections to the sandbox."""
    opened: list[socket.socket] = []

    def connect() -> socket.socket:
        host, port = sandbox_server.address.split(":")
        opened.append(socket.create_connection((host, int(port)), timeout=DEADLINE_S))
        return opened[-1]

    yield connect
    for connection in opened:
        connection.close()


@pytest.fixture(autouse=True)
def check_sandbox_still_serves(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test that used the shared sandbox, check that it still computes."""
    yield
    if "sandbox_server" in request.fixturenames:
        sandbox_server: SandboxProcess = request.getfixturevalue("sandbox_server")
        spec: FunctionSpec = request.getfixturevalue("spec")
        response = sandbox_server.http.post(f"/v1/functions/{spec.id}", content=request_frame())
        assert response.status_code == 200, response.text
