"""vLLM with functions generates what vLLM generates with its own experts, in float32.

For stores of other precisions, whose numbers vLLM's own experts would not have, the reference is
the router's own engine with the same functions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from metric_samples import parse_sample
from sandbox_processes import SandboxProcess, StartSandbox, block_specs
from vllm_checkpoints import FAMILIES, save_checkpoint
from vllm_runs import NEEDS_VLLM, run_vllm

from faasmoe_contracts.routing_table import RoutingTable
from faasmoe_contracts.store import QuantizationEntry, Store
from faasmoe_router.checkpoint.prepare import prepare
from faasmoe_router.dispatch import Dispatcher
from faasmoe_router.model_loader import load_router_model

pytestmark = [*NEEDS_VLLM, pytest.mark.timeout(1500)]

BLOCKS = (3, 5, 8)
PROMPTS = [[5 + i, 17, 99, 25, 31, 8, 40 + i, 3 * i + 1] for i in range(4)]
MAX_TOKENS = 16
TOKEN = "secret"
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def sandbox_process(sandbox: StartSandbox) -> Iterator[SandboxProcess]:
    with ExitStack() as stack:
        yield stack.enter_context(sandbox(capacity=200, token=TOKEN))


def attached_tables(store: Store, sandbox_process: SandboxProcess) -> list[RoutingTable]:
    return [
        RoutingTable(
            store.manifest.digest,
            version,
            tuple(sandbox_process.attach(store, spec) for spec in block_specs(store, block)),
        )
        for version, block in enumerate(BLOCKS)
    ]


def detach(tables: list[RoutingTable], sandbox_process: SandboxProcess) -> None:
    names = {entry.spec.id for table in tables for entry in table.functions}
    for name in names:
        sandbox_process.http.delete(f"/v1/functions/{name}").raise_for_status()


def generate_with_functions(
    store: Store, tables: list[RoutingTable], folder: Path, *, is_compiled: bool = False
) -> list[list[dict[str, Any]]]:
    """Return vLLM's outputs for each table; no function is computed in its own process."""
    file = folder / "table.json"
    file.write_text(json.dumps(tables[0].to_json()))
    request = {
        "store": str(store.path),
        "tables": [table.to_json() for table in tables],
        "prompts": PROMPTS,
        "max_tokens": MAX_TOKENS,
        "compile": is_compiled,
    }
    variables = {
        "STORE": str(store.path),
        "TABLE": str(file),
        "TOKEN": TOKEN,
        "METRICS_MIN_TOKENS": "1",
    }
    results, metrics = run_vllm(
        request, **{f"FAASMOE_{name}": value for name, value in variables.items()}
    )
    assert parse_sample(metrics, "faasmoe_router_function_calls_total") > len(tables)
    assert parse_sample(metrics, "faasmoe_router_local_computations_total") == 0
    return list(results)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_logprobs_equal_those_of_vllms_own_experts(
    family: str, sandbox_process: SandboxProcess, tmp_path: Path
) -> None:
    checkpoint = save_checkpoint(family, tmp_path / "checkpoint")
    store = prepare(str(checkpoint), tmp_path / "store")
    request = {"checkpoint": str(checkpoint), "prompts": PROMPTS, "max_tokens": MAX_TOKENS}
    (expected,) = run_vllm(request)
    tables = attached_tables(store, sandbox_process)
    for got in generate_with_functions(store, tables, tmp_path):
        for ours, own in zip(got, expected, strict=True):
            assert ours["tokens"] == own["tokens"]
            assert ours["logprobs"] == pytest.approx(own["logprobs"], abs=TOLERANCE)
            assert ours["prompt_logprobs"] == pytest.approx(own["prompt_logprobs"], abs=TOLERANCE)
    detach(tables, sandbox_process)


@pytest.mark.parametrize(
    ("dtype", "experts", "router"),
    [(torch.bfloat16, "none", "none"), (torch.float32, "int8", "none"), (None, "int8", "int8")],
    ids=["bf16", "int8 experts", "int8"],
)
def test_logprobs_equal_those_of_the_routers_own_engine_with_the_same_functions(
    dtype: torch.dtype | None,
    experts: str,
    router: str,
    sandbox_process: SandboxProcess,
    tmp_path: Path,
) -> None:
    checkpoint = save_checkpoint(
        "qwen2_moe", tmp_path / "checkpoint", dtype=dtype or torch.bfloat16
    )
    quantization = QuantizationEntry(experts, router)
    store = prepare(str(checkpoint), tmp_path / "store", quantization=quantization)
    tables = attached_tables(store, sandbox_process)
    outputs = generate_with_functions(store, tables, tmp_path)
    for table, got in zip(tables, outputs, strict=True):
        expected = prompt_logprobs(store, table)
        for ours, own in zip(got, expected, strict=True):
            assert ours["prompt_logprobs"] == pytest.approx(own, abs=2e-2)
    detach(tables, sandbox_process)


def test_compiled_code_generates_the_same(sandbox_process: SandboxProcess, tmp_path: Path) -> None:
    checkpoint = save_checkpoint("qwen2_moe", tmp_path / "checkpoint")
    store = prepare(str(checkpoint), tmp_path / "store")
    request = {"checkpoint": str(checkpoint), "prompts": PROMPTS, "max_tokens": MAX_TOKENS}
    (expected,) = run_vllm(request)
    tables = attached_tables(store, sandbox_process)
    (got,) = generate_with_functions(store, tables[-1:], tmp_path, is_compiled=True)
    for ours, own in zip(got, expected, strict=True):
        assert ours["tokens"] == own["tokens"]
        assert ours["logprobs"] == pytest.approx(own["logprobs"], abs=TOLERANCE)
    detach(tables, sandbox_process)


def prompt_logprobs(store: Store, table: RoutingTable) -> list[list[float]]:
    """Return the log-probabilities of the prompts' tokens after the first, by transformers."""
    dispatcher = Dispatcher(store, table, token=TOKEN)
    try:
        model = load_router_model(
            store, dispatcher, device=torch.device("cpu"), dtype=torch.float32
        )
        ids = torch.tensor(PROMPTS)  # [B, S]
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits  # [B, S, V]
    finally:
        dispatcher.close()
    logprobs = logits.float().log_softmax(-1)[:, :-1]  # [B, S-1, V]
    return list(logprobs.gather(-1, ids[:, 1:, None]).squeeze(-1).tolist())
