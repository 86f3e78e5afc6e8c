"""The golden test: logits through real sandboxes over HTTP equal the in-process model's.

For every family that transformers' experts interface covers, in float32. Two sandbox processes
serve all families in turn: functions are attached to them alternately, called, and detached.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch
from families.inputs import prompts
from families.registry import FAMILIES, Family, forward_logits
from prometheus_client import CollectorRegistry
from sandboxes import OpenSandbox, PreparedStore, SandboxProcess, block_specs
from torch import Tensor

from faasmoe_expert.store import Store
from faasmoe_expert.table import FunctionEntry, FunctionTable
from faasmoe_expert.wire import Mode
from faasmoe_router.dispatch import Dispatcher
from faasmoe_router.dispatch.metrics import DispatchMetrics
from faasmoe_router.engine.model import load_router_model

BLOCKS = (3, 5, 8)  # experts a function: 3+3+2, 5+3, 8 of 8
TOLERANCE = 1e-3
Sandboxes = tuple[SandboxProcess, ...]

every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


@pytest.fixture(scope="module")
def sandboxes(sandbox: OpenSandbox) -> Iterator[Sandboxes]:
    with ExitStack() as stack:
        yield tuple(stack.enter_context(sandbox(capacity=100, token="secret")) for _ in range(2))


@contextmanager
def dispatching(
    store: Store, sandboxes: Sandboxes, block: int, mode: Mode
) -> Iterator[tuple[Dispatcher, CollectorRegistry]]:
    entries: list[FunctionEntry] = []
    for position, spec in enumerate(block_specs(store, block)):
        entries.append(sandboxes[position % len(sandboxes)].attach(store, spec))
    table = FunctionTable(store.manifest.digest, 0, tuple(entries))
    registry = CollectorRegistry()
    metrics = DispatchMetrics(registry)
    dispatcher = Dispatcher(store, table, mode=mode, token="secret", metrics=metrics)
    try:
        yield dispatcher, registry
    finally:
        dispatcher.close()
        for position, entry in enumerate(entries):
            box = sandboxes[position % len(sandboxes)]
            assert box.http.delete(f"/v1/functions/{entry.spec.id}").status_code == 204


def counted(registry: CollectorRegistry, name: str) -> float:
    value = registry.get_sample_value(f"faasmoe_router_{name}_total")
    assert value is not None
    return value


def logits_through_functions(
    family: Family, store: Store, sandboxes: Sandboxes, *, block: int, mode: Mode
) -> Tensor:
    """Logits [B, S, V] with the experts in sandboxes; none of them computed in the router."""
    with dispatching(store, sandboxes, block, mode) as (dispatcher, registry):
        model = load_router_model(store, dispatcher, device=torch.device("cpu"))
        logits = forward_logits(family, model, prompts())
        assert counted(registry, "function_calls") >= len(store.manifest.layers) // 2
        assert counted(registry, "local_computations") == 0
        return logits


@every_family
def test_logits_equal_the_in_process_models_for_every_block_size(
    family: Family, sandboxes: Sandboxes, prepared_store: PreparedStore
) -> None:
    store = prepared_store(family.name)
    expected = forward_logits(family, family.build(), prompts())  # [B, S, V]
    for block in BLOCKS:
        got = logits_through_functions(
            family, store, sandboxes, block=block, mode=Mode.REDUCED
        )  # [B, S, V]
        assert (got - expected).abs().max() <= TOLERANCE
        assert torch.equal(got.argmax(-1), expected.argmax(-1))


@every_family
def test_unreduced_logits_are_bit_identical_across_block_sizes(
    family: Family, sandboxes: Sandboxes, prepared_store: PreparedStore
) -> None:
    store = prepared_store(family.name)
    expected = forward_logits(family, family.build(), prompts())  # [B, S, V]
    first, *others = (
        logits_through_functions(family, store, sandboxes, block=block, mode=Mode.UNREDUCED)
        for block in BLOCKS
    )
    assert (first - expected).abs().max() <= TOLERANCE
    assert torch.equal(first.argmax(-1), expected.argmax(-1))
    assert all(torch.equal(first, other) for other in others)


@every_family
def test_unreduced_experts_are_bit_identical_alone_and_co_batched(
    family: Family, sandboxes: Sandboxes, prepared_store: PreparedStore
) -> None:
    store = prepared_store(family.name)
    entry = store.manifest.layers[-1]
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(19, entry.hidden_size, generator=generator)  # [T, H]
    scores = torch.randn(19, entry.num_experts, generator=generator)  # [T, E]
    weight, index = scores.softmax(-1).topk(entry.top_k)  # [T, k] each
    with dispatching(store, sandboxes, 3, Mode.UNREDUCED) as (dispatcher, registry):
        together = dispatcher.compute(entry.index, hidden, index, weight)  # [T, H]
        alone = [
            dispatcher.compute(entry.index, hidden[t : t + 1], index[t : t + 1], weight[t : t + 1])
            for t in range(len(hidden))
        ]
        assert counted(registry, "local_computations") == 0
    assert torch.equal(together, torch.cat(alone))
