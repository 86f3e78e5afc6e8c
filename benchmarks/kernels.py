"""Measures the kernel library: one product by weight scheme and number of rows.

`python -m benchmarks.kernels` prints GB/s of weights and GFLOP/s beside what the machine can read
and compute, and torch's times with bfloat16 and float32 weights, and writes
benchmarks/out/kernels.json: `bandwidth_share.SCHEME.ROWS` on one thread, the same as
`bandwidth_share_2_threads`, `torch_ratio.SCHEME.ROWS` (torch's bfloat16 time over ours), and under
`isas` all figures. Shares are of medians, so the machine has to be quiet. Each call takes another
copy of the matrix, so that weights come from memory and not from the cache.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from benchmarks.report import OUT, Spread, describe_machine, write_figures
from numpy.typing import NDArray
from torch import Tensor

from faasmoe_kernels import (
    KernelDtype,
    KernelError,
    KernelLibrary,
    KernelsUnavailable,
    Matrix,
    ParameterDtype,
    Scheme,
    load,
)

ROW_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LIMITS_SOURCE = Path(__file__).with_name("machine_limits.cpp")
COLD_BYTES = 512 << 20  # of all copies of a matrix, and of the buffer that is read
MIN_CALLS, MAX_CALLS = 5, 60
SECONDS_PER_CASE = 0.12
DECODE_ROWS = (1, 2, 4)  # row counts that are measured on two threads too
TORCH_DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
READ_PASSES = 10
FMA_ITERATIONS = 40_000_000


@dataclass(frozen=True)
class WeightScheme:
    """A scheme as it is measured.

    Attributes:
        name: name in the figures.
        scheme: the library's scheme.
        bits: bits per weight, without scales.
        group: columns per scale; 0 for one per row, or for no scales.
        group_rows: rows per scale.
    """

    name: str
    scheme: Scheme
    bits: int
    group: int = 0
    group_rows: int = 1

    def size_bytes(self, n: int, k: int) -> int:
        """Return the bytes of weights and scales of a matrix [n, k]."""
        scale_bytes = 1 if self.scheme is Scheme.NVFP4 else 4
        return n * k * self.bits // 8 + scale_bytes * self.n_scales(n, k)

    def n_scales(self, n: int, k: int) -> int:
        """Return the number of scales of a matrix [n, k]."""
        if self.scheme < Scheme.INT8:
            return 0
        return -(-n // self.group_rows) * (-(-k // self.group) if self.group else 1)


SCHEMES = (
    WeightScheme("f32", Scheme.FLOAT32, 32),
    WeightScheme("bf16", Scheme.BFLOAT16, 16),
    WeightScheme("f16", Scheme.FLOAT16, 16),
    WeightScheme("int8", Scheme.INT8, 8),
    WeightScheme("int8-g128", Scheme.INT8, 8, 128),
    WeightScheme("int8-g32", Scheme.INT8, 8, 32),
    WeightScheme("int4-g128", Scheme.INT4, 4, 128),
    WeightScheme("int4-g32", Scheme.INT4, 4, 32),
    WeightScheme("mxfp4", Scheme.MXFP4, 4, 32),
    WeightScheme("fp8", Scheme.FP8, 8),
    WeightScheme("fp8-128x128", Scheme.FP8, 8, 128, 128),
    WeightScheme("fp8-g32", Scheme.FP8, 8, 32),
    WeightScheme("nvfp4", Scheme.NVFP4, 4, 16),
)


@dataclass(frozen=True)
class MachineLimits:
    """What this machine can do at most.

    Attributes:
        read_gb_per_s: bytes summed from a buffer larger than the caches, best pass, by threads.
        peak_gflop_per_s: float32 multiply-adds in registers of one thread, two operations each.
    """

    read_gb_per_s: dict[int, float]
    peak_gflop_per_s: float


def main() -> int:
    """Measure, print a table and write the figures; return the exit status."""
    arguments = parse_arguments()
    try:
        library = load()
    except KernelsUnavailable as error:
        print(f"benchmarks.kernels: {error}", file=sys.stderr)
        return 1
    torch.set_num_threads(1)
    machine, limits = describe_machine(), measure_limits()
    isas = arguments.isa.split(",") if arguments.isa else default_isas(library)
    names = arguments.schemes.split(",") if arguments.schemes else [s.name for s in SCHEMES]
    read = ", ".join(f"{gb:.1f} GB/s on {n}" for n, gb in limits.read_gb_per_s.items())
    print(f"reads {read} threads, computes {limits.peak_gflop_per_s:.0f} GFLOP/s in float32 on one")
    torch_ms = measure_torch(arguments.n, arguments.k)
    results = {}
    for isa in isas:
        library.use_isa(isa)
        results[isa] = {
            scheme.name: measure_scheme(library, scheme, arguments.n, arguments.k, limits, torch_ms)
            for scheme in SCHEMES
            if scheme.name in names
        }
    figures = {
        "machine": machine,
        "shape": [arguments.n, arguments.k],
        "read_gb_per_s": limits.read_gb_per_s,
        "peak_gflop_per_s": limits.peak_gflop_per_s,
        "isa": isas[0],
        "bandwidth_share": _column(results[isas[0]], "1", "share_of_read"),
        "bandwidth_share_2_threads": _column(results[isas[0]], "2", "share_of_read"),
        "torch_ratio": _column(results[isas[0]], "1", "torch_bf16_ratio"),
        "torch_ms": torch_ms,
        "isas": results,
    }
    print(f"wrote {write_figures('kernels', figures, folder=arguments.out)}")
    return 0


def parse_arguments() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=2816, help="output features")
    parser.add_argument("--k", type=int, default=2048, help="input features")
    parser.add_argument(
        "--isa", help="instruction sets, comma-separated; the best and avx2 by default"
    )
    parser.add_argument("--schemes", help="names to measure, comma-separated; all by default")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the figures")
    return parser.parse_args()


def default_isas(library: KernelLibrary) -> list[str]:
    """Return the instruction set in use, and avx2 if it is another one and works here."""
    best = library.isa
    try:
        library.use_isa("avx2")
    except KernelError:
        return [best]
    return list(dict.fromkeys((best, "avx2")))


def _column(schemes: dict[str, Any], threads: str, key: str) -> dict[str, dict[str, float]]:
    """Return one figure by scheme and rows."""
    return {
        name: {rows: figures[key] for rows, figures in by_threads[threads].items()}
        for name, by_threads in schemes.items()
    }


def measure_torch(n: int, k: int) -> dict[str, dict[str, float]]:
    """Return torch's median milliseconds on one thread, by dtype of the weights and rows."""
    result = {}
    for name, dtype in TORCH_DTYPES.items():
        weights = torch.randn(max(2, COLD_BYTES // (n * k * dtype.itemsize)), n, k, dtype=dtype)
        result[name] = {
            str(rows): 1e3
            * time_calls(linear_calls(weights, torch.randn(rows, k, dtype=dtype))).median
            for rows in ROW_COUNTS
        }
    return result


def measure_scheme(
    library: KernelLibrary,
    scheme: WeightScheme,
    n: int,
    k: int,
    limits: MachineLimits,
    torch_ms: dict[str, dict[str, float]],
) -> dict[str, dict[str, Any]]:
    """Return the figures of one scheme by number of threads and of rows, and print them."""
    size_bytes = scheme.size_bytes(n, k)
    copies = MatrixCopies(scheme, n, k, count=max(2, COLD_BYTES // size_bytes))
    result: dict[str, dict[str, Any]] = {}
    for n_threads, read_gb_per_s in limits.read_gb_per_s.items():
        result[str(n_threads)] = {}
        for rows in ROW_COUNTS if n_threads == 1 else DECODE_ROWS:
            x = torch.randn(rows, k).bfloat16()  # [rows, k]
            out = torch.empty(rows, n)  # [rows, n]
            ours_s = time_calls(copies.calls(library, x, out, n_threads))
            gb_per_s = size_bytes / ours_s.median / 1e9
            gflop_per_s = 2 * n * k * rows / ours_s.median / 1e9
            torch_bf16_ms, torch_f32_ms = (torch_ms[name][str(rows)] for name in TORCH_DTYPES)
            result[str(n_threads)][str(rows)] = {
                "ms": Spread(*(1e3 * s for s in (ours_s.median, ours_s.low, ours_s.high))),
                "gb_per_s": gb_per_s,
                "gflop_per_s": gflop_per_s,
                "share_of_read": gb_per_s / read_gb_per_s,
                "share_of_peak": gflop_per_s / (limits.peak_gflop_per_s * n_threads),
                "torch_bf16_ratio": torch_bf16_ms / (1e3 * ours_s.median),
                "torch_f32_ratio": torch_f32_ms / (1e3 * ours_s.median),
            }
            print(
                f"{library.isa:11} {n_threads} threads {scheme.name:10} {rows:4} rows "
                f"{1e3 * ours_s.median:8.3f} ms {gb_per_s:6.1f} GB/s "
                f"({gb_per_s / read_gb_per_s:4.0%}) {gflop_per_s:7.1f} GFLOP/s  "
                f"torch on 1: bf16 {torch_bf16_ms:8.3f} ms, f32 {torch_f32_ms:8.3f} ms",
                flush=True,
            )
    return result


class MatrixCopies:
    """Copies of one random matrix, together larger than the caches."""

    def __init__(self, scheme: WeightScheme, n: int, k: int, *, count: int) -> None:
        rng = np.random.default_rng(0)
        self._codes = _random_codes(rng, scheme, count, n * k)
        shape = count, scheme.n_scales(n, k)
        is_nvfp4 = scheme.scheme is Scheme.NVFP4
        self._scales: NDArray[Any] = (
            rng.integers(0x28, 0x38, shape, dtype=np.uint8)  # 1/4 to 1
            if is_nvfp4
            else rng.uniform(0.5, 1.5, shape).astype(np.float32) / 1000
        )
        self._matrices = [
            Matrix(
                scheme.scheme,
                n,
                k,
                self._codes[i].ctypes.data,
                scales=self._scales[i].ctypes.data if self._scales.size else 0,
                group=scheme.group,
                group_rows=scheme.group_rows,
                scale_dtype=ParameterDtype.E4M3 if is_nvfp4 else ParameterDtype.FLOAT32,
            )
            for i in range(count)
        ]

    def calls(
        self, library: KernelLibrary, x: Tensor, out: Tensor, n_threads: int
    ) -> Iterator[Callable[[], None]]:
        """Yield products of `x` with one copy after another, without end."""
        while True:
            for matrix in self._matrices:
                yield lambda m=matrix: library.linear(  # type: ignore[misc]
                    m,
                    x=x.data_ptr(),
                    x_dtype=KernelDtype.BFLOAT16,
                    x_stride=x.shape[1],
                    rows=x.shape[0],
                    out=out.data_ptr(),
                    out_dtype=KernelDtype.FLOAT32,
                    n_threads=n_threads,
                )


def _random_codes(
    rng: np.random.Generator, scheme: WeightScheme, count: int, n_weights: int
) -> NDArray[Any]:
    """Return `count` copies of random codes of `n_weights` weights, [count, ...]."""
    if scheme.scheme >= Scheme.INT8:
        codes = rng.integers(0, 256, n_weights * scheme.bits // 8, dtype=np.uint8)
    else:
        weights = torch.from_numpy(rng.standard_normal(n_weights, dtype=np.float32))
        dtypes = (torch.float32, torch.bfloat16, torch.float16)
        codes = weights.to(dtypes[scheme.scheme]).view(torch.uint8).numpy()
    return np.tile(codes, (count, 1))


def linear_calls(weights: Tensor, x: Tensor) -> Iterator[Callable[[], object]]:
    """Yield torch's products of `x` with one weight after another, without end."""
    while True:
        for weight in weights:
            yield lambda w=weight: F.linear(x, w)  # type: ignore[misc]


def time_calls(calls: Iterator[Callable[[], object]]) -> Spread:
    """Return the seconds of calls, repeated for SECONDS_PER_CASE after one that is not timed."""
    next(calls)()
    durations: list[float] = []
    deadline_s = time.perf_counter() + SECONDS_PER_CASE
    while len(durations) < MIN_CALLS or (
        len(durations) < MAX_CALLS and time.perf_counter() < deadline_s
    ):
        call = next(calls)
        start_s = time.perf_counter()
        call()
        durations.append(time.perf_counter() - start_s)
    return Spread.from_values(durations)


def measure_limits() -> MachineLimits:
    """Return what this machine can do on one thread and on two; compiles a small C++ file."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "limits.so"
        subprocess.run(
            ["c++", "-O3", "-march=native", "-shared", "-fPIC", str(LIMITS_SOURCE), "-o", target],
            check=True,
        )
        limits = ctypes.CDLL(str(target))
    limits.seconds_to_read.restype = limits.float32_operations_per_s.restype = ctypes.c_double
    limits.seconds_to_read.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)
    limits.float32_operations_per_s.argtypes = (ctypes.c_int64, ctypes.c_void_p)
    buffer, total = np.ones(COLD_BYTES, dtype=np.uint8), np.zeros(1, dtype=np.uint64)
    read = {1: COLD_BYTES / min(_seconds_to_read(limits, buffer, 1) for _ in range(READ_PASSES))}
    if len(os.sched_getaffinity(0)) > 1:
        read[2] = COLD_BYTES / min(_seconds_to_read(limits, buffer, 2) for _ in range(READ_PASSES))
    peak = max(limits.float32_operations_per_s(FMA_ITERATIONS, total.ctypes.data) for _ in range(3))
    return MachineLimits({n: rate / 1e9 for n, rate in read.items()}, peak / 1e9)


def _seconds_to_read(limits: ctypes.CDLL, buffer: NDArray[np.uint8], n_threads: int) -> float:
    """Return the seconds in which threads read the buffer, each a part of it."""
    part = len(buffer) // n_threads
    totals = np.zeros(n_threads, dtype=np.uint64)
    with ThreadPoolExecutor(n_threads) as pool:
        list(pool.map(abs, range(n_threads)))  # starts the threads
        start_s = time.perf_counter()
        addresses = [
            (buffer[i * part :].ctypes.data, totals[i:].ctypes.data) for i in range(n_threads)
        ]
        list(pool.map(lambda a: limits.seconds_to_read(a[0], part, a[1]), addresses))
        return time.perf_counter() - start_s


if __name__ == "__main__":
    sys.exit(main())
