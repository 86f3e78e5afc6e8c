"""Round trips of rows between two processes over every transport of the host."""

import socket
from contextlib import closing

import pytest
import torch
from benchmarks.cuda.round_trips import measure_transports
from benchmarks.cuda.transports import (
    IPC,
    PINNED,
    SHARED,
    SOCKETS,
    SharedMemoryTransport,
    SocketTransport,
    Transport,
    transports_for,
)

CPU = torch.device("cpu")


def test_measures_every_transport_of_the_host() -> None:
    times = measure_transports(CPU, [64, 100_000], rounds=3)
    assert list(times) == [SOCKETS, SHARED]
    assert all(times[kind][size].median > 0 for kind in times for size in ("64", "100000"))


def test_gpu_has_additional_transports() -> None:
    assert transports_for(torch.device("cuda")) == (SOCKETS, SHARED, PINNED, IPC)


@pytest.mark.parametrize("kind", [SOCKETS, SHARED])
def test_receive_raises_if_peer_is_gone(kind: str) -> None:
    local, peer = socket.socketpair()
    memory = torch.zeros(2, 8, dtype=torch.uint8)
    with closing(local):
        transport: Transport = SocketTransport(local, 8, CPU)
        if kind == SHARED:
            transport = SharedMemoryTransport(local, memory[0], memory[1], CPU, pinned=False)
        peer.close()
        with pytest.raises(EOFError, match="the other process exited"):
            transport.receive(torch.empty(8, dtype=torch.uint8))
