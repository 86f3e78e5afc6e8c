"""The functions' side of a vLLM worker: one dispatcher per process, configured by its environment.

Of several workers that compute a layer together, the first calls functions; the others' outputs are
zeros, which vLLM adds up over all of them.

It lives in whichever process vLLM computes its layers in. Besides the dispatcher it owns what this
needs there: the watch of the routing table, load reports and requests for activation, on an event
loop in a thread of its own.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import threading
import time
from collections.abc import Callable

import torch
from prometheus_client import CollectorRegistry, generate_latest
from torch import Tensor

from faasmoe_contracts.parent_death import die_with_parent
from faasmoe_contracts.store import Store
from faasmoe_router.config import RouterConfig
from faasmoe_router.control import ControlLink
from faasmoe_router.data_plane import create_dispatcher, open_store
from faasmoe_router.dispatch.device_transfer import transfer_for
from faasmoe_router.dispatch.dispatcher import SentLayer
from faasmoe_router.errors import RouterConfigError
from faasmoe_router.tenants.usage import FunctionCost, FunctionCostMeter

logger = logging.getLogger(__name__)

BUSY_S = 1.0
"""How long after a layer the engine counts as busy: between two steps it computes no layer."""
LINK_START_TIMEOUT_S = 30.0


class WorkerExperts:
    """The routed experts of a vLLM worker that calls no functions: another one does.

    Args:
        store: the prepared model.

    Attributes:
        store: the prepared model.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._layer_of = _layers_by_number(store)

    def layer_index(self, name: str, number: int, *, num_experts: int, hidden_size: int) -> int:
        """Return the index in the store of a MoE layer of vLLM's model.

        Args:
            name: its name in vLLM's model, for the error.
            number: number of the decoder layer.
            num_experts: its experts.
            hidden_size: width of its hidden states.

        Raises:
            RouterConfigError: the store has no such layer, or one of other sizes.
        """
        index = self._layer_of.get(number)
        if index is None:
            raise RouterConfigError(
                f"FAASMOE_STORE: vLLM's model has the MoE layer {name}, which the store has not"
            )
        entry = self.store.manifest.layers[index]
        got, expected = (num_experts, hidden_size), (entry.num_experts, entry.hidden_size)
        if got != expected:
            raise RouterConfigError(
                f"FAASMOE_STORE: {name}: vLLM's model has (experts, hidden size) {got}, expected "
                f"{expected}, which the store has"
            )
        return index

    def compute(
        self,
        layer: int,
        hidden: Tensor,
        top_k_index: Tensor,
        top_k_weight: Tensor,
        while_waiting: Callable[[], None] | None,
    ) -> Tensor:
        """Return this worker's part of the weighted sum of each token's experts, [T, H].

        Args:
            layer: index of the layer in the store.
            hidden: [T, H].
            top_k_index: [T, k].
            top_k_weight: [T, k].
            while_waiting: called while calls are in flight.
        """
        self.send(layer, hidden, top_k_index, top_k_weight)
        if while_waiting is not None:
            while_waiting()  # not by the dispatcher, which would change the number of threads
        return self.receive(layer, hidden)

    def send(self, layer: int, hidden: Tensor, top_k_index: Tensor, top_k_weight: Tensor) -> None:
        """Send the calls of a layer; a layer has one send before its receive."""

    def receive(self, layer: int, hidden: Tensor) -> Tensor:
        """Return the output of a layer that was sent, [T, H]."""
        return torch.zeros_like(hidden)

    def read_cost(self) -> FunctionCost:
        """Return what functions cost since the last call."""
        return FunctionCost()

    def metrics_text(self) -> bytes:
        """Return the metrics of the dispatcher in Prometheus' text format."""
        return b""

    def release_memory(self) -> None:
        """Free memory that is kept for the next calls."""


class ExpertCalls(WorkerExperts):
    """Computes the routed experts of a vLLM worker through functions.

    Belongs to the worker's thread, except for `read_cost` and `metrics_text`.

    Args:
        store: the prepared model.
        config: the router's settings.
        device: device of vLLM's model.

    Raises:
        RouterConfigError: the routing table cannot be used.

    Attributes:
        dispatcher: calls the functions.
    """

    def __init__(self, store: Store, config: RouterConfig, device: torch.device) -> None:
        super().__init__(store)
        self._registry = CollectorRegistry()
        self.dispatcher, link = create_dispatcher(
            self.store, config, self._registry, transfer_for(device)
        )
        self._cost_meter = FunctionCostMeter(self.store)
        self._sent: dict[int, SentLayer] = {}
        self._computed_s = float("-inf")
        self._n_tokens = 0  # computed so far
        self.dispatcher.show_calls_late(
            lambda: self._n_tokens, min_tokens=config.metrics_min_tokens
        )
        if link is not None:
            link.is_busy = lambda: time.monotonic() - self._computed_s < BUSY_S
            _run_link(link)

    def send(self, layer: int, hidden: Tensor, top_k_index: Tensor, top_k_weight: Tensor) -> None:
        """Send the calls of a layer; a layer has one send before its receive."""
        if layer == 0:
            self._n_tokens += len(hidden)
        self._sent[layer] = self.dispatcher.send(layer, hidden, top_k_index, top_k_weight)

    def receive(self, layer: int, hidden: Tensor) -> Tensor:
        """Return the output of a layer that was sent, [T, H]."""
        output = self.dispatcher.receive(self._sent.pop(layer))
        self._computed_s = time.monotonic()
        return output

    def read_cost(self) -> FunctionCost:
        """Return what functions cost since the last call."""
        specs = {name: entry.spec for name, entry in self.dispatcher.routing.entries.items()}
        return self._cost_meter.read_delta(self.dispatcher.load.snapshot(time.monotonic()), specs)

    def metrics_text(self) -> bytes:
        """Return the metrics of the dispatcher in Prometheus' text format."""
        return generate_latest(self._registry)

    def release_memory(self) -> None:
        """Free memory that is kept for the next calls."""
        self.dispatcher.release_memory()


def _layers_by_number(store: Store) -> dict[int, int]:
    """Return the index of each MoE layer by the number of its decoder layer."""
    return {decoder_layer(layer.name): layer.index for layer in store.manifest.layers}


def decoder_layer(name: str) -> int:
    """Return the number of the decoder layer that a module's name says; raises ValueError."""
    _, found, rest = name.partition("layers.")
    number = rest.split(".")[0]
    if not found or not number.isdecimal():
        raise ValueError(f"module: got {name!r}, expected a name with layers.NUMBER")
    return int(number)


def _run_link(link: ControlLink) -> None:
    """Run a link on an event loop in a daemon thread, which ends with the process."""
    started = threading.Event()

    async def run() -> None:
        async with link:
            started.set()
            await asyncio.Event().wait()

    threading.Thread(target=lambda: asyncio.run(run()), name="control-link", daemon=True).start()
    if not started.wait(LINK_START_TIMEOUT_S):
        raise RouterConfigError(
            f"FAASMOE_CONTROL_URL: the link did not start within {LINK_START_TIMEOUT_S:g} s"
        )


_calls: WorkerExperts | None = None


def expert_calls(device: torch.device, *, is_caller: bool) -> WorkerExperts:
    """Return the calls of this process, created at first from FAASMOE_* variables.

    Args:
        device: device of vLLM's model.
        is_caller: whether this worker calls functions, of those that compute a layer together.

    Raises:
        RouterConfigError: the store or the routing table cannot be used.
    """
    global _calls
    if _calls is None:
        if (parent := multiprocessing.parent_process()) is not None:
            die_with_parent(parent.pid)
        config = RouterConfig.from_env()
        store = open_store(config.store)
        _calls = ExpertCalls(store, config, device) if is_caller else WorkerExperts(store)
    return _calls


def current_calls() -> WorkerExperts:
    """Return the calls of this process, in which vLLM's model was built."""
    assert _calls is not None, "no MoE layer was built in this process"
    return _calls
