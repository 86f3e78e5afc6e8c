"""Transports that move rows between the device memories of two processes on one node.

They show what a frame costs in addition to HTTP. Sockets are the general transport. Shared memory
is what the router and its sandboxes use for large frames (docs/wire.md); if it is pinned, the
device accesses it directly. With CUDA IPC, rows never leave the device.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

SIGNAL = b"."
PEER_GONE = "the other process exited"


class Transport(Protocol):
    """One end of a transport; both ends have the same type."""

    def send(self, rows: Tensor) -> None:
        """Send rows [n] (uint8) from the device of this process."""

    def receive(self, rows: Tensor) -> None:
        """Receive into rows [n] on the device of this process.

        The copy to the device may still be in progress when this returns.
        """


class SocketTransport:
    """Transport through pinned host memory and a Unix socket."""

    def __init__(self, link: socket.socket, size_bytes: int, device: torch.device) -> None:
        self._link = link
        self._synchronize = synchronizer(device)
        self._host = pinned_host_memory(size_bytes, device)  # uint8 [n]
        self._view = memoryview(self._host.numpy().data)

    def send(self, rows: Tensor) -> None:
        """Copy the rows to the host, wait for the copy and send them."""
        self._host.copy_(rows, non_blocking=True)
        self._synchronize()
        self._link.sendall(self._view)

    def receive(self, rows: Tensor) -> None:
        """Receive the rows and start the copy to the device."""
        count = 0
        while count < len(self._view):
            received = self._link.recv_into(self._view[count:])
            if not received:
                raise EOFError(PEER_GONE)
            count += received
        rows.copy_(self._host, non_blocking=True)


class SharedMemoryTransport:
    """Transport through shared memory, with a signal byte over a socket.

    Args:
        link: socket for the signal byte.
        outgoing: memory that this end writes, uint8 [n].
        incoming: memory that this end reads, uint8 [n].
        device: device of the rows.
        pinned: whether the shared memory is pinned, so that the device accesses it directly.
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
        """Copy the rows into shared memory, wait for the copy and signal."""
        (self._outgoing if self._host is None else self._host).copy_(rows, non_blocking=True)
        self._synchronize()
        if self._host is not None:
            self._outgoing.copy_(self._host)
        self._link.sendall(SIGNAL)

    def receive(self, rows: Tensor) -> None:
        """Wait for the signal and start the copy to the device."""
        wait_for_signal(self._link)
        if self._host is not None:
            self._host.copy_(self._incoming)
        rows.copy_(self._incoming if self._host is None else self._host, non_blocking=True)


class CudaIpcTransport:
    """Transport through device memory that both processes have mapped."""

    def __init__(self, link: socket.socket, outgoing: Tensor, incoming: Tensor) -> None:
        self._link = link
        self._outgoing, self._incoming = outgoing, incoming
        self._synchronize = synchronizer(outgoing.device)

    def send(self, rows: Tensor) -> None:
        """Copy the rows on the device, wait for the copy and signal."""
        self._outgoing.copy_(rows)
        self._synchronize()
        self._link.sendall(SIGNAL)

    def receive(self, rows: Tensor) -> None:
        """Wait for the signal and start the copy on the device."""
        wait_for_signal(self._link)
        rows.copy_(self._incoming)


def wait_for_signal(link: socket.socket) -> None:
    """Wait for the signal of the other end; raises EOFError if the other process exited."""
    if link.recv(1) != SIGNAL:
        raise EOFError(PEER_GONE)


def synchronizer(device: torch.device) -> Callable[[], None]:
    """Return a function that waits for all pending work of a device."""
    return (lambda: None) if device.type == "cpu" else torch.cuda.synchronize


def pinned_host_memory(size_bytes: int, device: torch.device) -> Tensor:
    """Return host memory, uint8 [n], pinned unless the device is the CPU."""
    return torch.empty(size_bytes, dtype=torch.uint8, device="cpu", pin_memory=device.type != "cpu")


def pin_mapped_memory(memory: Tensor) -> None:
    """Pin mapped memory; raises RuntimeError if CUDA refuses."""
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    code = runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
    if int(code) != 0:
        raise RuntimeError(f"cudaHostRegister: got {code}, expected 0")


SOCKETS, SHARED, PINNED, IPC = "sockets", "shared memory", "shared memory, pinned", "CUDA IPC"


def transports_for(device: torch.device) -> tuple[str, ...]:
    """Return the names of the transports of a device."""
    return (SOCKETS, SHARED) if device.type == "cpu" else (SOCKETS, SHARED, PINNED, IPC)
