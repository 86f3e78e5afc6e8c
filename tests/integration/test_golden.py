"""Golden tests: logits computed through real sandboxes over HTTP equal those of one process.

They cover every family of transformers' experts interface, in float32, and some with 16-bit
functions. Two sandbox processes serve
all families in turn; functions are attached to them alternately, called and detached.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from families.inputs import prompts
from families.reference import upcast_model
from families.registry import FAMILIES, Family, forward_logits
from prometheus_client import CollectorRegistry
from sandbox_processes import PreparedStore, SandboxProcess, StartSandbox, block_specs
from torch import Tensor

from faasmoe_contracts.routing_table import FunctionEndpoints, RoutingTable
from faasmoe_contracts.store import Store
from faasmoe_contracts.wire import OutputMode
from faasmoe_router.dispatch import Dispatcher
from faasmoe_router.dispatch.metrics import DispatchMetrics
from faasmoe_router.model_loader import load_router_model

EXPERTS_PER_FUNCTION = (3, 5, 8)  # experts a function: 3+3+2, 5+3, 8 of 8
TOLERANCE = 1e-3
Sandboxes = tuple[SandboxProcess, ...]

QUICK_FAMILIES = {
    "mixtral": "gated",
    "nemotron_h": "plain",
    "aria": "transposed",
    "gpt_oss": "clamped, with biases",
    "deepseek_v4": "computed by its module",
    "muse_spark": "computed by its module, with shared parameters",
}
"""A family for each way to compute experts; of the others, some cases are slow."""

every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def family_cases(quick: Sequence[Any], slow: Sequence[Any]) -> Iterator[Any]:
    """Yield (family, case) for all cases; those of `slow` are marked so for most families."""
    for family in FAMILIES:
        for case in (*quick, *slow):
            is_slow = case in slow and family.name not in QUICK_FAMILIES
            marks = [pytest.mark.slow] if is_slow else []
            yield pytest.param(family, case, id=f"{family.name}-{case}", marks=marks)


@cache
def in_process_logits(family: Family) -> Tensor:
    """Return the logits [B, S, V] of a family's model in this process."""
    return forward_logits(family, family.build(), prompts())


@pytest.fixture(scope="module")
def sandboxes(sandbox: StartSandbox) -> Iterator[Sandboxes]:
    with ExitStack() as stack:
        yield tuple(stack.enter_context(sandbox(capacity=100, token="secret")) for _ in range(2))


@contextmanager
def running_dispatcher(
    store: Store, sandboxes: Sandboxes, block: int, mode: OutputMode
) -> Iterator[tuple[Dispatcher, CollectorRegistry]]:
    entries: list[FunctionEndpoints] = []
    for position, spec in enumerate(block_specs(store, block)):
        entries.append(sandboxes[position % len(sandboxes)].attach(store, spec))
    table = RoutingTable(store.manifest.digest, 0, tuple(entries))
    registry = CollectorRegistry()
    metrics = DispatchMetrics(registry)
    dispatcher = Dispatcher(store, table, mode=mode, token="secret", metrics=metrics)
    try:
        yield dispatcher, registry
    finally:
        dispatcher.close()
        for position, entry in enumerate(entries):
            sandbox = sandboxes[position % len(sandboxes)]
            assert sandbox.http.delete(f"/v1/functions/{entry.spec.id}").status_code == 204


def counter_value(registry: CollectorRegistry, name: str) -> float:
    value = registry.get_sample_value(f"faasmoe_router_{name}_total")
    assert value is not None
    return value


def logits_through_functions(
    family: Family,
    store: Store,
    sandboxes: Sandboxes,
    *,
    block: int,
    mode: OutputMode,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Logits [B, S, V] with the experts in sandboxes; none of them computed in the router.

    `dtype` is the router's, by default the store's.
    """
    with running_dispatcher(store, sandboxes, block, mode) as (dispatcher, registry):
        model = load_router_model(store, dispatcher, device=torch.device("cpu"), dtype=dtype)
        logits = forward_logits(family, model, prompts())
        assert counter_value(registry, "function_calls") >= len(store.manifest.layers) // 2
        assert counter_value(registry, "local_computations") == 0
        return logits


@pytest.mark.parametrize(("family", "block"), list(family_cases([3], [5, 8])))
def test_logits_equal_the_in_process_models(
    family: Family, block: int, sandboxes: Sandboxes, prepared_store: PreparedStore
) -> None:
    store, expected = prepared_store(family.name), in_process_logits(family)  # [B, S, V]
    got = logits_through_functions(
        family, store, sandboxes, block=block, mode=OutputMode.REDUCED
    )  # [B, S, V]
    assert (got - expected).abs().max() <= TOLERANCE
    assert torch.equal(got.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize(("family", "blocks"), list(family_cases([(3, 8)], [(5, 8)])))
def test_unreduced_logits_are_bit_identical_across_block_sizes(
    family: Family,
    blocks: tuple[int, ...],
    sandboxes: Sandboxes,
    prepared_store: PreparedStore,
) -> None:
    store, expected = prepared_store(family.name), in_process_logits(family)  # [B, S, V]
    first, *others = (
        logits_through_functions(family, store, sandboxes, block=block, mode=OutputMode.UNREDUCED)
        for block in blocks
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
    with running_dispatcher(store, sandboxes, 3, OutputMode.UNREDUCED) as (dispatcher, registry):
        together = dispatcher.compute(entry.index, hidden, index, weight)  # [T, H]
        alone = [
            dispatcher.compute(entry.index, hidden[t : t + 1], index[t : t + 1], weight[t : t + 1])
            for t in range(len(hidden))
        ]
        assert counter_value(registry, "local_computations") == 0
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("name", ["qwen2_moe", "mixtral", "olmoe", "hunyuan_v1_moe"])
@pytest.mark.parametrize("mode", OutputMode)
def test_float32_router_is_at_least_as_close_to_the_float32_model_as_a_bfloat16_one(
    name: str, mode: OutputMode, sandboxes: Sandboxes, prepared_store: PreparedStore
) -> None:
    """Over the same bfloat16 functions; both have the same, rounded weights as the float32 model.

    Not every tiny model: rounding decides between experts of nearly equal scores.
    """
    family, store = family_named(name), prepared_store(name, dtype="bfloat16")
    expected = forward_logits(family, upcast_model(family, store), prompts())  # [B, S, V]

    def mean_error(dtype: torch.dtype) -> float:
        got = logits_through_functions(family, store, sandboxes, block=3, mode=mode, dtype=dtype)
        assert got.dtype == dtype
        return (got.float() - expected).abs().mean().item()

    assert mean_error(torch.float32) <= mean_error(torch.bfloat16)


def family_named(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)
