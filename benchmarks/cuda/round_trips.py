"""Round-trip times of rows between two processes of one node, by transport.

`python -m benchmarks.cuda.round_trips DEVICE ROW_BYTES` prints the times in µs as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
from benchmarks.cuda.transports import (
    IPC,
    PINNED,
    SOCKETS,
    CudaIpcTransport,
    SharedMemoryTransport,
    SocketTransport,
    Transport,
    pin_mapped_memory,
    synchronizer,
    transports_for,
)
from benchmarks.report import Spread
from torch import Tensor

from faasmoe_contracts.parent_death import die_with_parent
from faasmoe_contracts.shared_region import SharedRegion
from faasmoe_expert.device import resolve_device

END_TIMEOUT_S = 30.0
WARM_UP = 20


@dataclass(slots=True)
class TransportEnd:
    """One of the two processes and its channels to the other.

    Attributes:
        is_first: whether it sends first.
        link: socket for rows and signals.
        pipe: pipe for readiness and for the handle of device memory.
        memory: shared memory, uint8 [2n].
        device: device of the rows.
    """

    is_first: bool
    link: socket.socket
    pipe: Connection
    memory: Tensor
    device: torch.device
    _buffer: Tensor | None = None
    _is_pinned: bool = False

    def open_transport(self, kind: str, size_bytes: int) -> Transport:
        """Open this end of a transport.

        Raises:
            RuntimeError: either end could not be opened; raised at both ends.
        """
        transport, error_message = None, ""
        try:
            transport = self._make_transport(kind, size_bytes)
        except (RuntimeError, OSError, AttributeError) as error:
            error_message = str(error) or type(error).__name__
        self.pipe.send(error_message)
        peer_error = self.pipe.recv()
        if transport is None or peer_error:
            raise RuntimeError(error_message or peer_error)
        return transport

    def _make_transport(self, kind: str, size_bytes: int) -> Transport:
        if kind == SOCKETS:
            return SocketTransport(self.link, size_bytes, self.device)
        if kind == IPC:
            return CudaIpcTransport(
                self.link, *self._split_halves(self._device_memory(), size_bytes)
            )
        if kind == PINNED and not self._is_pinned:
            pin_mapped_memory(self.memory)
            self._is_pinned = True
        halves = self._split_halves(self.memory, size_bytes)
        return SharedMemoryTransport(self.link, *halves, self.device, pinned=kind == PINNED)

    def _split_halves(self, memory: Tensor, size_bytes: int) -> tuple[Tensor, Tensor]:
        """Return the halves that this end writes and reads, uint8 [n] each."""
        half = len(memory) // 2
        first, second = memory[:size_bytes], memory[half : half + size_bytes]
        return (first, second) if self.is_first else (second, first)

    def _device_memory(self) -> Tensor:
        if self._buffer is None and self.is_first:
            buffer = torch.zeros(len(self.memory), dtype=torch.uint8, device=self.device)
            try:
                self.pipe.send(buffer)
            except (RuntimeError, OSError):
                self.pipe.send(None)
                raise
            self._buffer = buffer
        elif self._buffer is None:
            self._buffer = self.pipe.recv()
        if self._buffer is None:
            raise RuntimeError("the other process cannot share device memory")
        return self._buffer


def measure_transports(
    device: torch.device, sizes_bytes: Sequence[int], rounds: int
) -> dict[str, Any]:
    """Measure all transports of a device.

    Args:
        device: device of the rows.
        sizes_bytes: sizes of the rows.
        rounds: measured round trips per size.

    Returns:
        Round-trip times in µs by transport and size; for a transport that is not available, the
        reason under the key "failed".

    Raises:
        EOFError: the other process exited.
        TimeoutError: the other process hangs.
    """
    torch.set_num_threads(1)
    context = multiprocessing.get_context("spawn")
    local_socket, peer_socket = socket.socketpair()
    pipe, peer_pipe = context.Pipe()
    region = SharedRegion.create(2 * max(sizes_bytes))
    name = (os.getpid(), region.descriptor)
    arguments = (peer_socket, peer_pipe, name, str(device), tuple(sizes_bytes), rounds)
    peer = context.Process(target=_echo, args=arguments, daemon=True)
    peer.start()
    peer_socket.close()
    peer_pipe.close()  # otherwise the pipe would not report that the other process exited
    local_socket.settimeout(END_TIMEOUT_S)
    endpoint = TransportEnd(
        True, local_socket, pipe, torch.frombuffer(region.view, dtype=torch.uint8), device
    )
    results: dict[str, Any] = {}
    try:
        for kind in transports_for(device):
            try:
                results[kind] = {
                    str(size_bytes): _round_trips(
                        endpoint.open_transport(kind, size_bytes), size_bytes, device, rounds
                    )
                    for size_bytes in sizes_bytes
                }
            except RuntimeError as error:
                results[kind] = {"failed": str(error)}
    finally:
        local_socket.close()
        peer.join(END_TIMEOUT_S)
        peer.kill()
    return results


def _round_trips(
    transport: Transport, size_bytes: int, device: torch.device, rounds: int
) -> Spread:
    rows = torch.arange(size_bytes).to(torch.uint8).to(device)  # [n]
    returned = torch.empty_like(rows)
    wait = synchronizer(device)
    times_us = []
    for _ in range(WARM_UP + rounds):
        started_s = time.perf_counter()
        transport.send(rows)
        transport.receive(returned)
        wait()
        times_us.append((time.perf_counter() - started_s) * 1e6)
    if not torch.equal(returned.cpu(), rows.cpu()):
        raise AssertionError("the received rows differ from the sent ones")
    return Spread.from_values(times_us[WARM_UP:])


def _echo(
    link: socket.socket,
    pipe: Connection,
    name: tuple[int, int],
    device_name: str,
    sizes_bytes: Sequence[int],
    rounds: int,
) -> None:
    """Main function of the other process: sends back all rows."""
    die_with_parent(name[0])
    torch.set_num_threads(1)
    device = torch.device(device_name)
    region = SharedRegion.open(*name, 2 * max(sizes_bytes))
    endpoint = TransportEnd(
        False, link, pipe, torch.frombuffer(region.view, dtype=torch.uint8), device
    )
    for kind in transports_for(device):
        try:
            for size_bytes in sizes_bytes:
                transport = endpoint.open_transport(kind, size_bytes)
                rows = torch.empty(size_bytes, dtype=torch.uint8, device=device)  # [n]
                for _ in range(WARM_UP + rounds):
                    transport.receive(rows)
                    transport.send(rows)
        except RuntimeError:
            continue  # open_transport raises at the first end too


def main() -> int:
    """Print the round-trip times as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("device")
    parser.add_argument("row_bytes", type=int)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--rounds", type=int, default=200)
    arguments = parser.parse_args()
    device = resolve_device(arguments.device, field="device")
    sizes_bytes = [n_rows * arguments.row_bytes for n_rows in arguments.rows]
    results = measure_transports(device, sizes_bytes, arguments.rounds)
    print(json.dumps(results, default=asdict))
    return 0


if __name__ == "__main__":
    sys.exit(main())
