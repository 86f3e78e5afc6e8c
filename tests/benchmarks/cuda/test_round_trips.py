"""Rows go to another process and come back, whatever the way; one that is not there says why."""

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


def test_rows_come_back_by_every_way_of_the_host() -> None:
    found = measure_transports(CPU, [64, 100_000], rounds=3)
    assert list(found) == [SOCKETS, SHARED]
    assert all(found[kind][size].median > 0 for kind in found for size in ("64", "100000"))


def test_a_device_has_more_ways_than_the_host() -> None:
    assert transports_for(torch.device("cuda")) == (SOCKETS, SHARED, PINNED, IPC)


@pytest.mark.parametrize("kind", [SOCKETS, SHARED])
def test_an_end_that_is_left_alone_says_so(kind: str) -> None:
    here, there = socket.socketpair()
    memory = torch.zeros(2, 8, dtype=torch.uint8)
    with closing(here):
        way: Transport = SocketTransport(here, 8, CPU)
        if kind == SHARED:
            way = SharedMemoryTransport(here, memory[0], memory[1], CPU, pinned=False)
        there.close()
        with pytest.raises(EOFError, match="the other process ended"):
            way.receive(torch.empty(8, dtype=torch.uint8))
