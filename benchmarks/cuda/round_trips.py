"""What each way costs: round trips of rows between two processes of one node.

`python -m benchmarks.cuda.round_trips DEVICE ROW_BYTES` prints the microseconds as JSON.
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
from benchmarks.cuda.ways import (
    IPC,
    PINNED,
    SOCKETS,
    Ipc,
    Shared,
    Sockets,
    Way,
    kinds_for,
    pin,
    waiting_for,
)
from benchmarks.report import Spread
from torch import Tensor

from faasmoe_expert.device import resolve_device
from faasmoe_expert.lifeline import die_with_parent
from faasmoe_expert.shared_region import SharedRegion

END_TIMEOUT_S = 30.0
WARM_UP = 20


@dataclass(slots=True)
class End:
    """One of two processes, and what it has in common with the other.

    Attributes:
        is_first: whether it sends first.
        link: what carries rows and signals.
        pipe: what carries whether an end is ready, and the handle of device memory.
        memory: what both have mapped, uint8 [2n].
        device: where rows are.
    """

    is_first: bool
    link: socket.socket
    pipe: Connection
    memory: Tensor
    device: torch.device
    _buffer: Tensor | None = None
    _is_pinned: bool = False

    def open(self, kind: str, size_bytes: int) -> Way:
        """Return this end of a way; raises RuntimeError, at both ends, if there is none."""
        way, fault = None, ""
        try:
            way = self._way(kind, size_bytes)
        except (RuntimeError, OSError, AttributeError) as error:
            fault = str(error) or type(error).__name__
        self.pipe.send(fault)
        theirs = self.pipe.recv()
        if way is None or theirs:
            raise RuntimeError(fault or theirs)
        return way

    def _way(self, kind: str, size_bytes: int) -> Way:
        if kind == SOCKETS:
            return Sockets(self.link, size_bytes, self.device)
        if kind == IPC:
            return Ipc(self.link, *self._halves(self._device_memory(), size_bytes))
        if kind == PINNED and not self._is_pinned:
            pin(self.memory)
            self._is_pinned = True
        halves = self._halves(self.memory, size_bytes)
        return Shared(self.link, *halves, self.device, pinned=kind == PINNED)

    def _halves(self, memory: Tensor, size_bytes: int) -> tuple[Tensor, Tensor]:
        """Return what this end writes and what it reads, uint8 [n] each."""
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
            raise RuntimeError("the other process cannot share its device's memory")
        return self._buffer


def measure_ways(device: torch.device, sizes_bytes: Sequence[int], rounds: int) -> dict[str, Any]:
    """Return by way the microseconds of a round trip by size, or why there is none.

    Raises:
        EOFError: the other process ended.
        TimeoutError: it hangs.
    """
    torch.set_num_threads(1)
    context = multiprocessing.get_context("spawn")
    here, there = socket.socketpair()
    pipe, other_pipe = context.Pipe()
    region = SharedRegion.create(2 * max(sizes_bytes))
    name = (os.getpid(), region.descriptor)
    arguments = (there, other_pipe, name, str(device), tuple(sizes_bytes), rounds)
    other = context.Process(target=_echo, args=arguments, daemon=True)
    other.start()
    there.close()
    other_pipe.close()  # else nobody would be told that the other process ended
    here.settimeout(END_TIMEOUT_S)
    end = End(True, here, pipe, torch.frombuffer(region.view, dtype=torch.uint8), device)
    found: dict[str, Any] = {}
    try:
        for kind in kinds_for(device):
            try:
                found[kind] = {
                    str(size_bytes): _round_trips(
                        end.open(kind, size_bytes), size_bytes, device, rounds
                    )
                    for size_bytes in sizes_bytes
                }
            except RuntimeError as error:
                found[kind] = {"failed": str(error)}
    finally:
        here.close()
        other.join(END_TIMEOUT_S)
        other.kill()
    return found


def _round_trips(way: Way, size_bytes: int, device: torch.device, rounds: int) -> Spread:
    rows = torch.arange(size_bytes).to(torch.uint8).to(device)  # [n]
    back = torch.empty_like(rows)
    wait = waiting_for(device)
    took_us = []
    for _ in range(WARM_UP + rounds):
        begun_s = time.perf_counter()
        way.send(rows)
        way.receive(back)
        wait()
        took_us.append((time.perf_counter() - begun_s) * 1e6)
    if not torch.equal(back.cpu(), rows.cpu()):
        raise AssertionError("what came back is not what was sent")
    return Spread.of(took_us[WARM_UP:])


def _echo(
    link: socket.socket,
    pipe: Connection,
    name: tuple[int, int],
    device_name: str,
    sizes_bytes: Sequence[int],
    rounds: int,
) -> None:
    """Send back what comes: the other process."""
    die_with_parent(name[0])
    torch.set_num_threads(1)
    device = torch.device(device_name)
    region = SharedRegion.open(*name, 2 * max(sizes_bytes))
    end = End(False, link, pipe, torch.frombuffer(region.view, dtype=torch.uint8), device)
    for kind in kinds_for(device):
        try:
            for size_bytes in sizes_bytes:
                way = end.open(kind, size_bytes)
                rows = torch.empty(size_bytes, dtype=torch.uint8, device=device)  # [n]
                for _ in range(WARM_UP + rounds):
                    way.receive(rows)
                    way.send(rows)
        except RuntimeError:
            continue  # which the first end is told of, too


def main() -> int:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("device")
    parser.add_argument("row_bytes", type=int)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--rounds", type=int, default=200)
    arguments = parser.parse_args()
    device = resolve_device(arguments.device, field="device")
    sizes_bytes = [n_rows * arguments.row_bytes for n_rows in arguments.rows]
    found = measure_ways(device, sizes_bytes, arguments.rounds)
    print(json.dumps(found, default=asdict))
    return 0


if __name__ == "__main__":
    sys.exit(main())
