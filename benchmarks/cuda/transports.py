"""Rows from one process's device memory to another's and back, by each way there is on one node.

Nothing is computed: what is measured is what a frame's way costs beside HTTP, to choose by. Sockets
are the general way; shared memory is what the router and its sandboxes use for large frames
(docs/wire.md); pinned, it is copied to and from directly; by CUDA IPC nothing leaves the device.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

SIGNAL = b"."
PEER_GONE = "the other process ended"


class Transport(Protocol):
    """One end of a way; both ends are of the same kind."""

    def send(self, rows: Tensor) -> None:
        """Send rows [n] (uint8) of this process's device."""

    def receive(self, rows: Tensor) -> None:
        """Receive into rows [n] of this process's device; the device may be behind."""


class SocketTransport:
    """Through pinned memory and a Unix socket."""

    def __init__(self, link: socket.socket, size_bytes: int, device: torch.device) -> None:
        self._link = link
        self._synchronize = synchronizer(device)
        self._host = pinned_host_memory(size_bytes, device)  # uint8 [n]
        self._view = memoryview(self._host.numpy().data)

    def send(self, rows: Tensor) -> None:
        """Copy to the host, wait, send."""
        self._host.copy_(rows, non_blocking=True)
        self._synchronize()
        self._link.sendall(self._view)

    def receive(self, rows: Tensor) -> None:
        """Receive all, begin to copy to the device."""
        count = 0
        while count < len(self._view):
            received = self._link.recv_into(self._view[count:])
            if not received:
                raise EOFError(PEER_GONE)
            count += received
        rows.copy_(self._host, non_blocking=True)


class SharedMemoryTransport:
    """Through memory that both have mapped, and a byte that says so.

    Args:
        link: for the byte.
        mine: memory that this end writes, uint8 [n].
        other: memory that it reads, uint8 [n].
        device: where rows are.
        pinned: whether the device copies from and to both by itself.
    """

    def __init__(
        self,
        link: socket.socket,
        outgoing: Tensor,
        incoming: Tensor,
        device: torch.device,
        *,
        pinned: bool,
    ) -> None:
        self._link = link
        self._outgoing, self._incoming = outgoing, incoming
        self._synchronize = synchronizer(device)
        self._host = None if pinned else pinned_host_memory(len(outgoing), device)

    def send(self, rows: Tensor) -> None:
        """Copy into the memory, wait, tell."""
        (self._outgoing if self._host is None else self._host).copy_(rows, non_blocking=True)
        self._synchronize()
        if self._host is not None:
            self._outgoing.copy_(self._host)
        self._link.sendall(SIGNAL)

    def receive(self, rows: Tensor) -> None:
        """Hear, begin to copy to the device."""
        wait_for_signal(self._link)
        if self._host is not None:
            self._host.copy_(self._incoming)
        rows.copy_(self._incoming if self._host is None else self._host, non_blocking=True)


class CudaIpcTransport:
    """Through device memory that both have mapped."""

    def __init__(self, link: socket.socket, outgoing: Tensor, incoming: Tensor) -> None:
        self._link = link
        self._outgoing, self._incoming = outgoing, incoming
        self._synchronize = synchronizer(outgoing.device)

    def send(self, rows: Tensor) -> None:
        """Copy on the device, wait, tell."""
        self._outgoing.copy_(rows)
        self._synchronize()
        self._link.sendall(SIGNAL)

    def receive(self, rows: Tensor) -> None:
        """Hear, begin to copy on the device."""
        wait_for_signal(self._link)
        rows.copy_(self._incoming)


def wait_for_signal(link: socket.socket) -> None:
    """Wait for the other end's signal; raises EOFError if it has ended."""
    if link.recv(1) != SIGNAL:
        raise EOFError(PEER_GONE)


def synchronizer(device: torch.device) -> Callable[[], None]:
    """Return what waits for all that was begun on a device."""
    return (lambda: None) if device.type == "cpu" else torch.cuda.synchronize


def pinned_host_memory(size_bytes: int, device: torch.device) -> Tensor:
    """Return memory that the device copies from and to, uint8 [n]."""
    return torch.empty(size_bytes, dtype=torch.uint8, device="cpu", pin_memory=device.type != "cpu")


def pin_mapped_memory(memory: Tensor) -> None:
    """Let the device copy from and to mapped memory by itself; raises RuntimeError."""
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    code = runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
    if int(code) != 0:
        raise RuntimeError(f"cudaHostRegister: got {code}, expected 0")


SOCKETS, SHARED, PINNED, IPC = "sockets", "shared memory", "shared memory, pinned", "CUDA IPC"


def transports_for(device: torch.device) -> tuple[str, ...]:
    """Return the ways that a device has."""
    return (SOCKETS, SHARED) if device.type == "cpu" else (SOCKETS, SHARED, PINNED, IPC)
