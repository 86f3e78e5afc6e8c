"""Computes experts of a mapped file whose pages are evicted; a process of its own, see its test.

`python limited_memory_calls.py FILE SCENARIO` writes the file and prints a JSON object.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import resource
import sys
from io import FileIO
from pathlib import Path
from threading import Event, Thread

import numpy as np
from numpy.typing import NDArray

from faasmoe_kernels import Activation, Gating, KernelDtype, Matrix, Scheme, load, matrix_table
from faasmoe_kernels.library import MappingGuard

N_EXPERTS, HIDDEN, INTERMEDIATE, ROWS = 24, 512, 512, 3
FIRST_BYTES, DOWN_BYTES = 2 * INTERMEDIATE * HIDDEN * 2, HIDDEN * INTERMEDIATE * 2
EXPERT_BYTES = FIRST_BYTES + DOWN_BYTES
PAGEOUT = 21
HOT = (0, 1)
PAGE_BYTES = mmap.PAGESIZE


class Experts:
    """The experts of a file, bfloat16, one after the other."""

    def __init__(self, path: Path) -> None:
        numbers = np.random.default_rng(0).standard_normal(N_EXPERTS * EXPERT_BYTES // 2)
        bits = (numbers.astype(np.float32) * 0.05).view(np.uint32) >> 16
        with path.open("wb") as file:
            file.write(bits.astype(np.uint16).tobytes())
            os.fsync(file.fileno())
        self.file = path.open("r+b")
        self.mapping = mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.address = np.frombuffer(self.mapping, dtype=np.uint8).ctypes.data
        self.library = load()
        rng = np.random.default_rng(1)
        self.x = rng.standard_normal((ROWS, HIDDEN)).astype(np.float32)

    def table(self, experts: NDArray[np.int64], offset: int, n: int, k: int) -> NDArray[np.uint8]:
        """Return the descriptors of one projection."""
        addresses = [self.address + int(e) * EXPERT_BYTES + offset for e in experts]
        matrices = [Matrix(Scheme.BFLOAT16, n, k, address) for address in addresses]
        return np.frombuffer(matrix_table(matrices), np.uint8)

    def compute(self, chosen: range | tuple[int, ...], *, layer: int | None) -> bytes:
        """Return the sums of all rows over the chosen experts, with different weights."""
        experts = np.array(sorted(chosen), dtype=np.int64)
        first = self.table(experts, 0, 2 * INTERMEDIATE, HIDDEN)
        down = self.table(experts, FIRST_BYTES, HIDDEN, INTERMEDIATE)
        rows = np.tile(np.arange(ROWS), len(experts))
        weights = np.linspace(0.1, 0.9, len(rows), dtype=np.float32)
        sizes = np.full(len(experts), ROWS, dtype=np.int64)
        out = np.empty((ROWS, HIDDEN), dtype=np.float32)
        self.library.experts(
            *(first.ctypes.data, down.ctypes.data, Gating(Activation.SILU)),
            n_groups=len(experts),
            group_sizes=sizes.ctypes.data,
            pair_rows=rows.ctypes.data,
            pair_positions=0,
            pair_weights=weights.ctypes.data,
            x=self.x.ctypes.data,
            x_dtype=KernelDtype.FLOAT32,
            hidden_size=HIDDEN,
            rows=ROWS,
            is_reduced=True,
            out=out.ctypes.data,
            out_dtype=KernelDtype.FLOAT32,
            n_threads=2,
            layer=layer,
        )
        return out.tobytes()

    def evict(self) -> None:
        """Drop the file from memory."""
        self.mapping.madvise(PAGEOUT)
        os.posix_fadvise(self.file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def resident(self) -> list[float]:
        """Return the part of each expert's pages that is in memory."""
        n_pages = N_EXPERTS * EXPERT_BYTES // PAGE_BYTES
        flags = (ctypes.c_uint8 * n_pages)()
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mincore(ctypes.c_void_p(self.address), N_EXPERTS * EXPERT_BYTES, flags):
            raise OSError(ctypes.get_errno(), "mincore")
        pages = np.frombuffer(bytes(flags), np.uint8).reshape(N_EXPERTS, -1) & 1
        return [float(x) for x in pages.mean(axis=1)]

    def is_read_from_disk(self) -> bool:
        """Read all; return whether that came from a disk."""
        self.evict()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_inblock
        np.frombuffer(self.mapping, dtype=np.uint8)[::PAGE_BYTES].sum()
        return resource.getrusage(resource.RUSAGE_SELF).ru_inblock - before >= 4096


def stay(experts: Experts) -> dict[str, object]:
    """Evict everything before each of many calls, and tell what is in memory once that ends."""
    calls = [(*HOT, *range(2 + n % 11, N_EXPERTS, 11)) for n in range(40)]
    expected = {call: experts.compute(call, layer=None) for call in set(calls)}
    all_sums = experts.compute(range(N_EXPERTS), layer=None)
    experts.evict()
    is_equal = experts.compute(range(N_EXPERTS), layer=0) == all_sums  # more than is read ahead
    for call in calls:
        experts.evict()
        is_equal &= experts.compute(call, layer=0) == expected[call]
    for call in calls[:11]:
        is_equal &= experts.compute(call, layer=0) == expected[call]
    is_equal &= experts.compute(range(N_EXPERTS), layer=0) == all_sums
    return {"is_equal": is_equal, "resident": experts.resident()}


def read_beside(experts: Experts) -> dict[str, object]:
    """Read another file from the disk while everything stays in memory."""
    is_done, other = Event(), Path(f"{sys.argv[1]}.other")
    other.write_bytes(bytes(8 << 20))
    with other.open("rb", buffering=0) as file:
        os.fsync(file.fileno())
        reader = Thread(target=_read_again_and_again, args=(file, is_done))
        reader.start()
        for _ in range(25):
            experts.compute(range(N_EXPERTS), layer=0)
        is_done.set()
        reader.join()
    return {"resident": experts.resident()}


def _read_again_and_again(file: FileIO, is_done: Event) -> None:
    while not is_done.is_set():
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        file.read()


def truncate(experts: Experts) -> dict[str, object]:
    """Truncate the file, and compute what is missing."""
    guard = experts.library.guard_mapping(experts.address, len(experts.mapping))
    assert isinstance(guard, MappingGuard)
    experts.evict()
    os.truncate(experts.file.fileno(), N_EXPERTS // 2 * EXPERT_BYTES)
    for _ in range(3):
        experts.compute(range(N_EXPERTS), layer=0)
    return {"is_damaged": guard.is_damaged}


def main() -> None:
    """Run one scenario."""
    experts = Experts(Path(sys.argv[1]))
    scenarios = {"stay": stay, "read_beside": read_beside, "truncate": truncate}
    result: dict[str, object] = {"is_from_disk": experts.is_read_from_disk()}
    if result["is_from_disk"]:
        result |= scenarios[sys.argv[2]](experts)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
