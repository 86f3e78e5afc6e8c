"""A store and a server of its blocks, in a thread of the test's process."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from sandbox_processes import PreparedStore

from faasmoe_contracts.store import Store
from faasmoe_expert.blocks.index import BlockIndex
from faasmoe_expert.blocks.server import BlockServer

TOKEN = "peer-token"

StartServer = Callable[..., str]
"""Type of the fixture `start_server`: `start_server(token=…)` returns its URL."""


@pytest.fixture(scope="session")
def store(prepared_store: PreparedStore) -> Store:
    """Three MoE layers of 8 experts, hidden size 32, float32."""
    return prepared_store("mixtral")


@contextmanager
def running_server(index: BlockIndex, **settings: Any) -> Iterator[str]:
    options = {"token": TOKEN, "max_connections": 16, **settings}
    with BlockServer(("127.0.0.1", 0), index, **options) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def start_server(store: Store) -> Iterator[StartServer]:
    """Run a server until the end of the test; another index may be given."""
    with ExitStack() as stack:

        def start(index: BlockIndex | None = None, **settings: Any) -> str:
            return stack.enter_context(running_server(index or BlockIndex(store), **settings))

        yield start
