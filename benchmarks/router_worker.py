"""Benchmark worker with the router of `faasmoe up`, without its HTTP API.

It reads the router's usual environment. The command line names the other processes whose CPU time
is added to that of the router.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import sys
import threading
import time
import urllib.request
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from benchmarks.decoding import ResourceReading, RunRecorder
from benchmarks.dispatch_profiler import DispatchProfiler
from benchmarks.resource_usage import CpuClock
from benchmarks.worker import RUN_TIMEOUT_S, CommandHandler, serve_commands

from faasmoe_contracts.routing_table import RoutingTable
from faasmoe_contracts.store import Store
from faasmoe_expert.device import resolve_device
from faasmoe_router.compute_dtype import select_compute_dtype
from faasmoe_router.config import RouterConfig
from faasmoe_router.dispatch import Dispatcher
from faasmoe_router.dispatch.device_transfer import transfer_for
from faasmoe_router.dispatch.metrics import DispatchMetrics
from faasmoe_router.engine.batcher import EngineLimits, start_batcher
from faasmoe_router.model_loader import load_router_model

STOP_TIMEOUT_S = 30.0
_EXPERT_SECONDS = re.compile(rb"^faasmoe_expert_compute_seconds_sum (\S+)$", re.MULTILINE)


class RouterWorker:
    """Generates with a model whose experts are functions in other processes.

    Args:
        config: configuration of the router, with a static routing table.
        sandbox_pids: all other processes of the deployment.
    """

    def __init__(self, config: RouterConfig, sandbox_pids: Sequence[int]) -> None:
        self._metrics = DispatchMetrics()
        self._router_clock = CpuClock([os.getpid()])
        self._sandbox_clock = CpuClock(sandbox_pids)
        self._stopwatch = DispatchProfiler()
        self._recorder = RunRecorder(self._read_resources)
        store = Store.open(config.store)
        assert config.table is not None  # set by static_deployment
        table = RoutingTable.loads(config.table.read_bytes())
        device = resolve_device(config.device)
        self._addresses = {a for entry in table.functions for a in entry.addresses}
        self._dispatcher = Dispatcher(
            store,
            table,
            token=config.token,
            metrics=self._metrics,
            socket_dir=config.socket_dir,
            device_transfer=transfer_for(device),
            placement=config.placement,
        )
        dtype = select_compute_dtype(config.dtype, store, device).dtype
        model = load_router_model(store, self._dispatcher, device=device, dtype=dtype)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._batcher = start_batcher(
            model,
            _engine_limits(config),
            self._loop,
            on_outputs=lambda outputs, _: self._recorder.record_step(outputs),
            on_request_error=self._recorder.fail,
        )

    def handle(self, command: dict[str, Any]) -> dict[str, Any]:
        """Run a batch; with `profile`, also time the parts of dispatch."""
        prompts, max_tokens = command["prompts"], int(command["max_tokens"])
        experts_s = self._mean_expert_seconds()
        with self._stopwatch.profiling() if command.get("profile") else nullcontext():
            names = self._recorder.start(len(prompts), max_tokens=max_tokens)
            for name, prompt in zip(names, prompts, strict=True):
                self._batcher.add_request(name, prompt, max_tokens=max_tokens, stop_token_ids=())
            run = self._recorder.wait(RUN_TIMEOUT_S)
        if run.counters["failed"] or run.counters["local"]:
            raise RuntimeError(f"calls to sandboxes failed: {dict(run.counters)}")
        expert_time = {"experts_of_run": self._mean_expert_seconds() - experts_s}
        return replace(run, counters={**run.counters, **expert_time}).to_json()

    def _mean_expert_seconds(self) -> float:
        """Return the mean compute time of the sandboxes in seconds."""
        pages = [urllib.request.urlopen(f"http://{a}/metrics").read() for a in self._addresses]
        matches = [_EXPERT_SECONDS.search(page) for page in pages]
        return sum(float(match[1]) for match in matches if match) / len(pages)

    def close(self) -> None:
        """Stop the batcher, the event loop and the dispatcher."""
        self._batcher.stop(STOP_TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._dispatcher.close()

    def _read_resources(self) -> ResourceReading:
        self._metrics.windows.before_taking()
        router_s, others_s = self._router_clock.read_s(), self._sandbox_clock.read_s()
        counters = {
            "calls": _counter_value(self._metrics.calls),
            "failed": _counter_value(self._metrics.failed_calls),
            "local": _counter_value(self._metrics.local),
            "cpu_router": router_s,
            "cpu_others": others_s,
            **self._stopwatch.seconds,
        }
        return ResourceReading(time.perf_counter(), router_s + others_s, counters)


def _engine_limits(config: RouterConfig) -> EngineLimits:
    assert config.max_model_len is not None
    return EngineLimits(
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        kv_cache_bytes=config.kv_cache_bytes,
    )


def _counter_value(counter: Any) -> float:
    samples = counter.collect()[0].samples
    return float(next(s.value for s in samples if s.name.endswith("_total")))


def main() -> int:
    """Serve commands until stdin is closed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("pids", type=int, nargs="+", help="launcher, zygote and sandboxes")
    arguments = parser.parse_args()
    workers: list[RouterWorker] = []

    def make_handler() -> CommandHandler:
        workers.append(RouterWorker(RouterConfig.from_env(), arguments.pids))
        return workers[0].handle

    try:
        serve_commands(make_handler)
    finally:
        for worker in workers:
            worker.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
