"""Relays a router's offer of a mailbox to a sandbox, and flips bits in the mailbox.

The sandbox opens the memory of the process at the other end of its Unix socket, which is the
proxy: so the proxy opens the router's memory and offers its own descriptor of it. Frames then pass
between router and sandbox directly; kills, hangs and corrupted stores meet calls over mailboxes.
"""

from __future__ import annotations

import asyncio
import json
import mmap
import os
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from faasmoe_contracts.shared_region import MAILBOX_PATH, open_sealed_memory
from faasmoe_contracts.unix_socket import peer_pid

DATA_OFFSET = 8192  # of the frames in a mailbox with up to 4 slots
_REQUEST = f"PUT {MAILBOX_PATH} ".encode()
_LENGTH = re.compile(rb"content-length: (\d+)")


class MailboxRelay:
    """The mailboxes that a proxy has relayed and whose connections are open."""

    def __init__(self) -> None:
        self._memories: list[mmap.mmap] = []

    def flip(self) -> None:
        """Flip a bit in the used part of the first frame of each mailbox."""
        for memory in self._memories:
            position = DATA_OFFSET + random.randrange(256)
            memory[position] ^= 1 << random.randrange(8)

    @contextmanager
    def offering(self, head: bytes, body: bytes, client: object) -> Iterator[bytes]:
        """Yield the request to the sandbox; the memory is kept while the context is open.

        Raises:
            OSError: the router's memory cannot be opened.
        """
        offer = json.loads(body)
        pid = peer_pid(client)  # type: ignore[arg-type]
        if pid is None:
            raise OSError("the router's process is unknown")
        descriptor = open_sealed_memory(pid, offer["descriptor"], offer["size_bytes"])
        try:
            memory = mmap.mmap(descriptor, offer["size_bytes"])
            own_body = json.dumps({**offer, "descriptor": descriptor}).encode()
            self._memories.append(memory)
            yield _LENGTH.sub(b"content-length: %d" % len(own_body), head) + own_body
        finally:
            with suppress(UnboundLocalError, ValueError):
                self._memories.remove(memory)
            os.close(descriptor)


async def read_offer(reader: asyncio.StreamReader) -> tuple[bytes, bytes | None]:
    """Read the first bytes of a connection: the head and body of an offer, or (bytes, None)."""
    start = await reader.read(1 << 14)
    if not start.startswith(_REQUEST) or b"\r\n\r\n" not in start:
        return start, None
    head, _, body = start.partition(b"\r\n\r\n")
    match = _LENGTH.search(head)
    missing = int(match[1] if match else 0) - len(body)
    return head + b"\r\n\r\n", body + (await reader.readexactly(missing) if missing > 0 else b"")
