"""Measures what a call to a function costs beyond its matrix products, on both sides.

`python -m benchmarks.call [--quick] [--path http|mailbox|all] [--out FOLDER]`, `make bench-call`.

The router's side is `Dispatcher.compute` in this process, the sandboxes are those of `faasmoe up`
with one function each. CPU time is that of this process and of all sandboxes, over many layers of 1
to 8 rows; the same products, called directly in the kernel library by one thread of this process,
are subtracted. Experts are small, so that the products do not hide what is measured. Writes
call_cost.json: `cpu_ms_per_call`, both sides together, by path and rows.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.geometry import CheckpointGeometry, small_geometry
from benchmarks.report import OUT, Spread, describe_machine, percentile, write_figures
from benchmarks.resource_usage import CpuClock
from benchmarks.static_deployment import (
    ResidentFunctions,
    make_model_in_subprocess,
    resident_functions,
    write_moemodel,
)
from numpy.typing import NDArray
from torch import Tensor

from faasmoe_contracts.routing_table import RoutingTable
from faasmoe_contracts.store import Store
from faasmoe_expert.functions import ExpertFunction
from faasmoe_expert.functions.native_kernel import DTYPES, NativeLayer
from faasmoe_kernels import load
from faasmoe_operator.cli.formatting import format_table
from faasmoe_router.dispatch import Dispatcher
from faasmoe_router.dispatch.layer_batch import Group, group_pairs
from faasmoe_router.dispatch.metrics import DispatchMetrics

PATHS = ("http", "mailbox")
ROWS = (1, 2, 4, 8)
GEOMETRY = CheckpointGeometry(
    layers=4, vocabulary=512, hidden=1024, heads=8, intermediate=64, shared_intermediate=64
)
N_BLOCKS = 3
WARM_LAYERS = 40
OPEN_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class LayerInput:
    """The arguments of one layer: hidden [T, H], top_k_index [T, k], top_k_weight [T, k]."""

    layer: int
    hidden: Tensor
    top_k_index: Tensor
    top_k_weight: Tensor


@dataclass(frozen=True, slots=True)
class CallCost:
    """CPU time per call in milliseconds, and the time of a layer.

    Attributes:
        router_ms: of the router's process.
        sandboxes_ms: of all sandboxes.
        products_ms: of the same products in one process.
        layer_p50_ms: median time of a layer.
    """

    router_ms: float
    sandboxes_ms: float
    products_ms: float
    layer_p50_ms: float

    @property
    def beyond_products_ms(self) -> float:
        """What both sides spend beyond the products."""
        return self.router_ms + self.sandboxes_ms - self.products_ms


def make_inputs(store: Store, n_rows: int, n_layers: int) -> list[LayerInput]:
    """Return random inputs for consecutive layers, the same for every path."""
    random = torch.Generator().manual_seed(n_rows)
    layers, inputs = store.manifest.layers, []
    for i in range(n_layers):
        entry = layers[i % len(layers)]
        scores = torch.rand(n_rows, entry.num_experts, generator=random)
        weight, index = scores.topk(entry.top_k)
        hidden = torch.randn(n_rows, entry.hidden_size, generator=random)
        inputs.append(LayerInput(entry.index, hidden, index, weight / weight.sum(-1, keepdim=True)))
    return inputs


class PreparedProducts:
    """The products of some layers, as calls of the kernel library with prepared arguments."""

    def __init__(self, store: Store, table: RoutingTable, inputs: Sequence[LayerInput]) -> None:
        self._functions = {f.spec: ExpertFunction(f.spec, store) for f in table.functions}
        self._calls: list[Callable[[], None]] = []
        dtype: torch.dtype = getattr(torch, store.manifest.model.dtype)
        for layer in inputs:
            specs = [f.spec for f in table.functions if layer.layer in f.spec.layers]
            function_of = np.empty(store.manifest.layers[layer.layer].num_experts, dtype=np.int32)
            for i, spec in enumerate(specs):
                function_of[list(spec.experts)] = i
            rows = layer.hidden.to(dtype)
            for group in group_pairs(
                layer.top_k_index.numpy(), layer.top_k_weight.numpy(), function_of, max_rows=4096
            ):
                function = self._functions[specs[group.function_index]]
                native = {n.layer: n for n in function.native_layers}[layer.layer]
                self._calls.append(_prepare(native, group, rows))

    def cpu_ms_per_call(self) -> float:
        """Return the CPU time of one call in milliseconds."""
        start_s = time.thread_time()
        for call in self._calls:
            call()
        return (time.thread_time() - start_s) * 1e3 / len(self._calls)


def _prepare(native: NativeLayer, group: Group, rows: Tensor) -> Callable[[], None]:
    """Return a call of the library for one group."""
    order = np.argsort(group.pair_expert, kind="stable")  # [P]
    experts, sizes = np.unique(group.pair_expert, return_counts=True)  # [G]
    first, down = native.first[experts], native.down[experts]  # [G, MATRIX_BYTES]
    pair_rows: NDArray[np.int64] = group.pair_row[order].astype(np.int64)  # [P]
    weights, sizes = group.pair_weight[order], sizes.astype(np.int64)
    x = rows[torch.from_numpy(group.rows)].contiguous()  # [R, H]
    out = torch.empty(x.shape)  # [R, H], float32
    library = load()

    def call() -> None:
        library.experts(
            first.ctypes.data,
            down.ctypes.data,
            native.gating,
            n_groups=len(experts),
            group_sizes=sizes.ctypes.data,
            pair_rows=pair_rows.ctypes.data,
            pair_positions=0,
            pair_weights=weights.ctypes.data,
            x=x.data_ptr(),
            x_dtype=DTYPES[x.dtype],
            hidden_size=x.shape[1],
            rows=len(x),
            is_reduced=True,
            out=out.data_ptr(),
            out_dtype=DTYPES[out.dtype],
        )

    return call


def measure_path(
    dispatcher: Dispatcher,
    metrics: DispatchMetrics,
    inputs: Sequence[LayerInput],
    sandboxes: CpuClock,
    products: PreparedProducts,
) -> CallCost:
    """Run the layers and return the cost of a call."""
    if dispatcher.native is not None:
        addresses = dispatcher.routing.addresses()
        if not dispatcher.native.connector.wait_until_open(addresses, OPEN_TIMEOUT_S):
            raise RuntimeError("mailboxes: got none at some sandboxes, expected them at all")
    for layer in inputs[:WARM_LAYERS]:
        _compute(dispatcher, layer)
    calls, layer_ms = _counter(metrics), []
    sandboxes_s, router_s = sandboxes.read_s(), time.process_time()
    for layer in inputs:
        start_s = time.perf_counter()
        _compute(dispatcher, layer)
        layer_ms.append((time.perf_counter() - start_s) * 1e3)
    router_s = time.process_time() - router_s
    sandboxes_s = sandboxes.read_s() - sandboxes_s
    n_calls = _counter(metrics) - calls
    return CallCost(
        router_s * 1e3 / n_calls,
        sandboxes_s * 1e3 / n_calls,
        products.cpu_ms_per_call(),
        percentile(layer_ms, 50),
    )


def _compute(dispatcher: Dispatcher, layer: LayerInput) -> None:
    dispatcher.compute(layer.layer, layer.hidden, layer.top_k_index, layer.top_k_weight)


def _counter(metrics: DispatchMetrics) -> float:
    failed, local = (_value(c) for c in (metrics.failed_calls, metrics.local))
    if failed or local:
        raise RuntimeError(f"got {failed:g} failed and {local:g} local calls, expected none")
    return _value(metrics.calls)


def _value(counter: Any) -> float:
    return float(next(iter(counter.collect())).samples[0].value)


def measure(
    functions: ResidentFunctions, paths: Sequence[str], *, rounds: int, n_layers: int
) -> dict[str, dict[str, list[CallCost]]]:
    """Measure the paths in turns; return the costs of each round by path and rows."""
    environment = functions.environment
    table = RoutingTable.loads(Path(environment["FAASMOE_TABLE"]).read_bytes())
    clock = CpuClock(functions.sandbox_pids)
    costs: dict[str, dict[str, list[CallCost]]] = {p: {str(n): [] for n in ROWS} for p in paths}
    inputs = {n: make_inputs(functions.store, n, n_layers) for n in ROWS}
    products = {n: PreparedProducts(functions.store, table, inputs[n]) for n in ROWS}
    for path, n_rows in _turns(paths, rounds):
        metrics = DispatchMetrics()
        with closing(_make_dispatcher(functions, table, metrics, path)) as dispatcher:
            cost = measure_path(dispatcher, metrics, inputs[n_rows], clock, products[n_rows])
        costs[path][str(n_rows)].append(cost)
    return costs


def _turns(paths: Sequence[str], rounds: int) -> Iterator[tuple[str, int]]:
    for _ in range(rounds):
        for n_rows in ROWS:
            for path in paths:
                yield path, n_rows


def _make_dispatcher(
    functions: ResidentFunctions, table: RoutingTable, metrics: DispatchMetrics, path: str
) -> Dispatcher:
    return Dispatcher(
        functions.store,
        table,
        token=functions.environment["FAASMOE_TOKEN"],
        metrics=metrics,
        socket_dir=Path(functions.environment["FAASMOE_SOCKET_DIR"]),
        mailbox=path == "mailbox",
    )


def figures(costs: Mapping[str, Mapping[str, Sequence[CallCost]]]) -> dict[str, Any]:
    """Return the figures to write: medians over the rounds with their spread."""
    result: dict[str, Any] = {"cpu_ms_per_call": {}, "parts": {}, "mean_cpu_ms_per_call": {}}
    for path, by_rows in costs.items():
        beyond = {
            n: Spread.from_values([c.beyond_products_ms for c in cs]) for n, cs in by_rows.items()
        }
        result["cpu_ms_per_call"][path] = {n: s.median for n, s in beyond.items()}
        result["mean_cpu_ms_per_call"][path] = statistics.mean(s.median for s in beyond.values())
        result["parts"][path] = {
            n: {
                "beyond_products_ms": beyond[n],
                **{
                    name: Spread.from_values([getattr(c, name) for c in cs])
                    for name in CallCost.__slots__
                },
            }
            for n, cs in by_rows.items()
        }
    return result


def print_table(result: Mapping[str, Any]) -> None:
    """Print one line per path and number of rows."""
    columns = ("beyond_products_ms", "router_ms", "sandboxes_ms", "products_ms", "layer_p50_ms")
    lines = [
        (path, n, *(part[c].format(3) for c in columns))
        for path, parts in result["parts"].items()
        for n, part in parts.items()
    ]
    print(format_table(("PATH", "ROWS", *(c.upper() for c in columns)), lines))


async def run(options: argparse.Namespace) -> dict[str, Any]:
    """Start the sandboxes and measure."""
    geometry = small_geometry() if options.quick else GEOMETRY
    checkpoint, store = await make_model_in_subprocess(geometry, options.cache)
    moemodel = options.cache / "call.json"
    write_moemodel(
        moemodel,
        checkpoint=checkpoint,
        store=store,
        experts_per_function=-(-geometry.experts // N_BLOCKS),
        max_model_len=64,
    )
    paths = PATHS if options.path == "all" else (options.path,)
    rounds, n_layers = (1, 60) if options.quick else (5, 400)
    async with resident_functions(moemodel) as functions:
        costs = await asyncio.to_thread(measure, functions, paths, rounds=rounds, n_layers=n_layers)
    return figures(costs)


def main() -> None:
    """Parse the command line, measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model and few calls")
    parser.add_argument("--path", choices=(*PATHS, "all"), default="all", help="default: all")
    parser.add_argument("--cache", type=Path, default=OUT / "models", help="folder of the model")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of call_cost.json")
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    machine = describe_machine()
    result = asyncio.run(run(options))
    print_table(result)
    print(write_figures("call_cost", {"machine": machine, **result}, folder=options.out))


if __name__ == "__main__":
    main()
