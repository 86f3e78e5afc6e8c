"""Rows go to another process and come back, whatever the way; one that is not there says why."""

import torch
from benchmarks.cuda.round_trips import measure_ways
from benchmarks.cuda.ways import IPC, PINNED, SHARED, SOCKETS, kinds_for

CPU = torch.device("cpu")


def test_rows_come_back_by_every_way_of_the_host() -> None:
    found = measure_ways(CPU, [64, 100_000], rounds=3)
    assert list(found) == [SOCKETS, SHARED]
    assert all(found[kind][size].median > 0 for kind in found for size in ("64", "100000"))


def test_a_device_has_more_ways_than_the_host() -> None:
    assert kinds_for(torch.device("cuda")) == (SOCKETS, SHARED, PINNED, IPC)
