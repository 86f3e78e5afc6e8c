"""Opens mailboxes at the sandboxes of this machine, in a thread of its own.

A mailbox is shared memory in which this router leaves frames for one sandbox (docs/wire.md,
"Mailboxes"). It is offered over the sandbox's Unix socket, which stays connected: its end is the
mailbox's. A sandbox that refuses is asked again after a while, and called over HTTP meanwhile.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from faasmoe_contracts.shared_region import MAILBOX_PATH, create_sealed_memory
from faasmoe_contracts.unix_socket import LOOPBACK_HOSTS, connect_unix, unix_socket_path
from faasmoe_kernels.function_layers import CallsError

logger = logging.getLogger(__name__)

N_SLOTS = 2
"""Frames of one mailbox: a layer has one, and an answer that came too late may be owed."""

REQUEST_TIMEOUT_S = 2.0
FIRST_RETRY_S = 0.5
MAX_RETRY_S = 30.0


class MailboxCalls(Protocol):
    """What makes mailboxes; `LayerCalls`."""

    def add_mailbox(
        self,
        descriptor: int,
        size_bytes: int,
        *,
        n_slots: int,
        request_bytes: int,
        response_bytes: int,
        socket: int,
    ) -> int:
        """Write a mailbox into memory; return its handle."""

    def remove_mailbox(self, mailbox: int) -> None:
        """Stop using a mailbox."""


@dataclass(frozen=True, slots=True)
class MailboxSizes:
    """Sizes of a mailbox in bytes.

    Attributes:
        request_bytes: of the largest request frame, a multiple of 64.
        response_bytes: of the largest response frame, a multiple of 64.
        total_bytes: of the whole mailbox.
    """

    request_bytes: int
    response_bytes: int
    total_bytes: int


class MailboxRefused(Exception):
    """The sandbox has no mailbox for this router; the message says why."""


@dataclass(slots=True)
class _Retry:
    at_s: float
    delay_s: float


class MailboxConnector:
    """Keeps a mailbox open at every wanted address of this machine.

    Its thread starts with the first such address.

    Args:
        calls: makes the mailboxes.
        sizes: sizes of each mailbox.
        socket_dir: folder of the Unix sockets of sandboxes on this machine.
        token: bearer token of the sandboxes.

    Attributes:
        version: increases whenever the open mailboxes change.
    """

    def __init__(
        self, calls: MailboxCalls, sizes: MailboxSizes, *, socket_dir: Path, token: str
    ) -> None:
        self.version = 0
        self._calls = calls
        self._sizes = sizes
        self._socket_dir = socket_dir
        self._token = token
        self._changed = threading.Condition()  # guards everything below
        self._wanted: frozenset[str] = frozenset()
        self._open: dict[str, int] = {}
        self._retries: dict[str, _Retry] = {}
        self._is_closed = False
        self._thread: threading.Thread | None = None

    def mailboxes(self) -> dict[str, int]:
        """Return the handle of each address with an open mailbox; safe from any thread."""
        with self._changed:
            return dict(self._open)

    def opening(self) -> frozenset[str]:
        """Return the wanted addresses whose sandboxes have not been asked yet; from any thread."""
        with self._changed:
            return self._wanted - self._open.keys() - self._retries.keys()

    def want(self, addresses: Collection[str]) -> None:
        """Open mailboxes at these addresses and close all others; safe from any thread."""
        local = frozenset(a for a in addresses if _is_loopback(a))
        with self._changed:
            self._wanted = local
            for address in self._open.keys() - local:
                self._remove(address)
            self._retries = {a: r for a, r in self._retries.items() if a in local}
            if local and self._thread is None and not self._is_closed:
                self._thread = threading.Thread(target=self._run, name="mailboxes", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def drop(self, address: str, mailbox: int, *, retry_s: float = FIRST_RETRY_S) -> bool:
        """Close a mailbox that failed, and open another after `retry_s`; safe from any thread.

        Returns:
            Whether it was open, so that its failure is the sandbox's.
        """
        with self._changed:
            if self._open.get(address) != mailbox:
                return False
            self._remove(address)
            self._retries[address] = _Retry(time.monotonic() + retry_s, retry_s)
            self._changed.notify_all()
            return True

    def wait_until_open(self, addresses: Collection[str], timeout_s: float) -> bool:
        """Wait until all addresses have a mailbox; return whether they do."""
        with self._changed:
            return self._changed.wait_for(lambda: set(addresses) <= self._open.keys(), timeout_s)

    def close(self) -> None:
        """Stop the thread and close all mailboxes."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        with self._changed:
            for address in list(self._open):
                self._remove(address)

    def _remove(self, address: str) -> None:
        self._calls.remove_mailbox(self._open.pop(address))
        self.version += 1

    def _run(self) -> None:
        while (address := self._next_address()) is not None:
            try:
                mailbox = open_mailbox(
                    address,
                    self._calls,
                    self._sizes,
                    socket_dir=self._socket_dir,
                    token=self._token,
                )
            except MailboxRefused as error:
                self._postpone(address, error)
                continue
            with self._changed:
                self._retries.pop(address, None)
                self._open[address] = mailbox
                self.version += 1
                if address not in self._wanted:
                    self._remove(address)
                self._changed.notify_all()

    def _next_address(self) -> str | None:
        """Wait for an address to open a mailbox at; None once closed."""
        with self._changed:
            while not self._is_closed:
                now_s, next_s = time.monotonic(), None
                for address in self._wanted - self._open.keys():
                    retry = self._retries.get(address)
                    if retry is None or retry.at_s <= now_s:
                        return address
                    next_s = retry.at_s if next_s is None else min(next_s, retry.at_s)
                self._changed.wait(None if next_s is None else next_s - now_s)
            return None

    def _postpone(self, address: str, error: MailboxRefused) -> None:
        with self._changed:
            earlier = self._retries.get(address)
            delay_s = FIRST_RETRY_S if earlier is None else min(2 * earlier.delay_s, MAX_RETRY_S)
            self._retries[address] = _Retry(time.monotonic() + delay_s, delay_s)
        if earlier is None:
            logger.info("%s: no mailbox, calls go over HTTP: %s", address, error)


def open_mailbox(
    address: str, calls: MailboxCalls, sizes: MailboxSizes, *, socket_dir: Path, token: str
) -> int:
    """Make a mailbox and have the sandbox serve it; return its handle.

    Raises:
        MailboxRefused: there is no such sandbox on this machine, or it refuses.
    """
    connection = connect_unix(socket_dir, address)
    if connection is None:
        path = unix_socket_path(socket_dir, int(address.rpartition(":")[2]))
        raise MailboxRefused(f"{path}: cannot connect")
    try:
        with connection:
            connection.settimeout(REQUEST_TIMEOUT_S)
            descriptor = create_sealed_memory("faasmoe-mailbox", sizes.total_bytes)
            try:
                return _offer(connection, descriptor, address, calls, sizes, token)
            finally:
                os.close(descriptor)
    except (OSError, http.client.HTTPException, CallsError) as error:
        raise MailboxRefused(f"{address}: {error}") from error


def _offer(
    connection: socket.socket,
    descriptor: int,
    address: str,
    calls: MailboxCalls,
    sizes: MailboxSizes,
    token: str,
) -> int:
    mailbox = calls.add_mailbox(
        descriptor,
        sizes.total_bytes,
        n_slots=N_SLOTS,
        request_bytes=sizes.request_bytes,
        response_bytes=sizes.response_bytes,
        socket=connection.fileno(),
    )
    try:
        body = json.dumps({"descriptor": descriptor, "size_bytes": sizes.total_bytes})
        authorization = f"authorization: Bearer {token}\r\n" if token else ""
        connection.sendall(
            f"PUT {MAILBOX_PATH} HTTP/1.1\r\nhost: {address}\r\n{authorization}"
            f"content-length: {len(body)}\r\n\r\n{body}".encode()
        )
        response = http.client.HTTPResponse(connection)
        response.begin()
        text = response.read()
        if response.status != 201:
            reason = text[:200].decode("utf-8", "replace")
            raise MailboxRefused(f"status {response.status}: {reason}")
    except BaseException:
        calls.remove_mailbox(mailbox)
        raise
    return mailbox


def _is_loopback(address: str) -> bool:
    host, _, port = address.rpartition(":")
    return host in LOOPBACK_HOSTS and port.isdecimal()
