"""Key rotation under load: no client with a valid key is rejected."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

Until = Callable[[Callable[[], bool]], None]
N_CLIENTS = 8
N_ROTATIONS = 6


def test_keys_are_rotated_under_load_without_a_failed_request(
    open_router: Any, until: Until
) -> None:
    with open_router({"acme": {}}) as router, ThreadPoolExecutor(N_CLIENTS) as pool:
        current, done, statuses = ["acme-key"], threading.Event(), []

        def call() -> None:
            while not done.is_set():
                key = current[0]
                statuses.append(router.post("/acme/v1/completions", key=key).status_code)

        def wait_for(key: str, status: int) -> None:
            until(lambda: router.get("/v1/models", key=key).status_code == status)

        def wait_for_answers(count: int) -> None:
            until(lambda: len(statuses) >= count)

        clients = [pool.submit(call) for _ in range(N_CLIENTS)]
        for number in range(N_ROTATIONS):
            old, new = current[0], f"acme-key-{number}"
            router.files.keys("acme", old, new)  # both are valid until the clients use the new one
            wait_for(new, 200)
            current[0] = new
            wait_for_answers(
                len(statuses) + 2 * N_CLIENTS
            )  # no call in flight uses the old one any more
            router.files.keys("acme", new)
            wait_for(old, 401)
        done.set()
        for client in clients:
            client.result()
        assert set(statuses) == {200}
        assert len(statuses) > N_ROTATIONS * 2 * N_CLIENTS
