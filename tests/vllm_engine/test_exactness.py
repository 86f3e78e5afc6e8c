"""vLLM with functions generates what vLLM generates with its own experts, in float32.

The reference of an int8 store is a checkpoint with the store's weights, dequantised. Calls of a
bfloat16 store have rows of 16 bits, which vLLM's own experts in float32 have not: its errors are
compared with those of vLLM computing in bfloat16, too. Where a gate scores two experts nearly the
same, rounded rows may choose the other one; texts that then part have to be those of vLLM's own
experts in float32 with rows of 16 bits.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from metric_samples import parse_sample
from sandbox_processes import SandboxProcess, StartSandbox, block_specs
from vllm_checkpoints import FAMILIES, save_checkpoint, save_dequantised
from vllm_runs import NEEDS_VLLM, run_vllm

from faasmoe_contracts.routing_table import RoutingTable
from faasmoe_contracts.store import QuantizationEntry, Store
from faasmoe_router.checkpoint.prepare import NO_QUANTIZATION, prepare

pytestmark = [*NEEDS_VLLM, pytest.mark.timeout(1500)]

BLOCKS = (3, 5, 8)
PROMPTS = [[5 + i, 17, 99, 25, 31, 8, 40 + i, 3 * i + 1] for i in range(4)]
MAX_TOKENS = 16
TOKEN = "secret"
TOLERANCE = 1e-4
INT8_TOLERANCE = 1e-3  # kernels round activations to 16 bits of a group's largest
BF16_TOLERANCE = 5e-2


@pytest.fixture(scope="module")
def sandbox_process(sandbox: StartSandbox) -> Iterator[SandboxProcess]:
    with ExitStack() as stack:
        yield stack.enter_context(sandbox(capacity=200, token=TOKEN))


def attached_tables(
    store: Store, sandbox_process: SandboxProcess, blocks: Sequence[int]
) -> list[RoutingTable]:
    return [
        RoutingTable(
            store.manifest.digest,
            version,
            tuple(sandbox_process.attach(store, spec) for spec in block_specs(store, block)),
        )
        for version, block in enumerate(blocks)
    ]


def detach(tables: list[RoutingTable], sandbox_process: SandboxProcess) -> None:
    names = {entry.spec.id for table in tables for entry in table.functions}
    for name in names:
        sandbox_process.http.delete(f"/v1/functions/{name}").raise_for_status()


def generate_with_own_experts(
    checkpoint: Path,
    *,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    dtype: torch.dtype = torch.float32,
    rows_dtype: torch.dtype | None = None,
) -> list[dict[str, Any]]:
    """Return vLLM's outputs without functions.

    Args:
        checkpoint: the model.
        prompts: token ids.
        dtype: what it computes in.
        rows_dtype: what the inputs of experts are rounded to; None for `dtype`.
    """
    request = {
        "checkpoint": str(checkpoint),
        "prompts": prompts,
        "max_tokens": MAX_TOKENS,
        "dtype": _name_of(dtype),
        "rows_dtype": None if rows_dtype is None else _name_of(rows_dtype),
    }
    (outputs,) = run_vllm(request)
    return list(outputs)


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def prompt_errors(got: list[dict[str, Any]], exact: list[dict[str, Any]]) -> list[float]:
    """Return by how much the log-probability of each token of the prompts is off."""
    return [
        abs(a - b)
        for some, others in zip(got, exact, strict=True)
        for a, b in zip(some["prompt_logprobs"], others["prompt_logprobs"], strict=True)
    ]


def generate_with_functions(
    store: Store,
    tables: list[RoutingTable],
    folder: Path,
    *,
    is_compiled: bool = False,
    workers: int = 1,
    further: Mapping[str, str] | None = None,
) -> list[list[dict[str, Any]]]:
    """Return vLLM's outputs for each table; no function is computed in its own process.

    `further` are environment variables.
    """
    file = folder / "table.json"
    file.write_text(json.dumps(tables[0].to_json()))
    request = {
        "store": str(store.path),
        "tables": [table.to_json() for table in tables],
        "prompts": PROMPTS,
        "max_tokens": MAX_TOKENS,
        "compile": is_compiled,
        "workers": workers,
    }
    variables = {
        "STORE": str(store.path),
        "TABLE": str(file),
        "TOKEN": TOKEN,
        "METRICS_MIN_TOKENS": "1",
    }
    variables = {f"FAASMOE_{name}": value for name, value in variables.items()}
    if workers > 1:
        variables["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(workers)))
    results, metrics, mapped = run_vllm(request, **variables, **(further or {}))
    if store.manifest.model.dtype == "float32" and not store.manifest.router.quantized:
        is_gpt_oss = store.manifest.model.architecture == "GptOssForCausalLM"
        embeddings = f"model.{'embedding' if is_gpt_oss else 'embed_tokens'}.weight"
        assert mapped == ([] if workers > 1 else [embeddings, "lm_head.weight"])
    assert parse_sample(metrics, "faasmoe_router_function_calls_total") > len(tables)
    assert parse_sample(metrics, "faasmoe_router_local_computations_total") == 0
    return list(results)


def assert_equal(
    got: list[dict[str, Any]],
    expected: list[dict[str, Any]],
    tolerance: float,
    *,
    near_tie: float,
    with_rounded_rows: Callable[[], list[dict[str, Any]]] | None = None,
) -> None:
    """Assert equal log-probabilities, and texts up to where the best two tokens are a near-tie.

    Args:
        got: outputs of vLLM with functions.
        expected: outputs of vLLM with its own experts in float32.
        tolerance: of log-probabilities.
        near_tie: how much less likely the second-best token may be where texts part.
        with_rounded_rows: returns outputs of vLLM with its own experts in float32, but rows of 16
            bits, for the prompts followed by the expected texts. Where texts part at no near-tie,
            both tokens must be as likely, relative to each other, as there.
    """
    for prompt, (ours, own) in enumerate(zip(got, expected, strict=True)):
        assert ours["prompt_logprobs"] == pytest.approx(own["prompt_logprobs"], abs=tolerance)
        pairs = zip(ours["tokens"], own["tokens"], strict=True)
        n_equal = next((n for n, (got_, own_) in enumerate(pairs) if got_ != own_), MAX_TOKENS)
        logprobs = own["logprobs"]
        assert ours["logprobs"][:n_equal] == pytest.approx(logprobs[:n_equal], abs=tolerance)
        if n_equal == MAX_TOKENS:
            continue
        tokens = own["tokens"][n_equal], ours["tokens"][n_equal]
        margin = margin_of(own["tops"][n_equal], *tokens)
        if with_rounded_rows is None or margin <= near_tie:
            assert margin <= near_tie
            continue
        tops = with_rounded_rows()[prompt]["prompt_tops"][len(PROMPTS[prompt]) - 1 + n_equal]
        got_margin = margin_of(ours["tops"][n_equal], *tokens)
        assert got_margin == pytest.approx(margin_of(tops, *tokens), abs=tolerance)


def margin_of(tops: Mapping[str, float], first: int, second: int) -> float:
    """Return how much likelier one of the likeliest tokens is than another, in nats."""
    return tops[str(first)] - tops[str(second)]


@dataclass
class Comparison:
    """Compares vLLM with functions with vLLM with its own experts.

    Args:
        sandbox_process: runs the functions.
        folder: for the checkpoints and the store.
    """

    sandbox_process: SandboxProcess
    folder: Path

    def check(
        self,
        family: str,
        *,
        quantization: QuantizationEntry = NO_QUANTIZATION,
        blocks: Sequence[int] = BLOCKS,
        tolerance: float = TOLERANCE,
        near_tie: float = 0.0,
        runs: Sequence[Mapping[str, str]] = ({},),
        **options: Any,
    ) -> None:
        """Assert that a family's texts and log-probabilities are the same.

        Args:
            family: the family of a tiny random model.
            quantization: of the store; its reference has the weights of the store.
            blocks: experts of a function, in turn.
            tolerance: of log-probabilities.
            near_tie: how much less likely the second-best token is where texts may part.
            runs: environment variables of vLLM with functions, for each time that it runs.
            options: of `generate_with_functions`.
        """
        checkpoint = save_checkpoint(family, self.folder / "checkpoint")
        store = prepare(str(checkpoint), self.folder / "store", quantization=quantization)
        if quantization != NO_QUANTIZATION:
            checkpoint = save_dequantised(store, checkpoint, self.folder / "dequantised")
        expected = generate_with_own_experts(checkpoint)
        tables = attached_tables(store, self.sandbox_process, blocks)
        for further in runs:
            results = generate_with_functions(
                store, tables, self.folder, further=further, **options
            )
            for got in results:
                assert_equal(got, expected, tolerance, near_tie=near_tie)
        detach(tables, self.sandbox_process)

    def check_bfloat16(self, family: str) -> None:
        """Assert that functions of bfloat16 are off by no more than vLLM in bfloat16 is.

        Both are compared with vLLM in float32, with the same weights.
        """
        checkpoint = save_checkpoint(family, self.folder / "checkpoint", dtype=torch.bfloat16)
        store = prepare(str(checkpoint), self.folder / "store", quantization=NO_QUANTIZATION)
        exact = generate_with_own_experts(checkpoint)
        rounded = generate_with_own_experts(checkpoint, dtype=torch.bfloat16)
        own_errors = prompt_errors(rounded, exact)

        @cache
        def with_rounded_rows() -> list[dict[str, Any]]:
            texts = [[*ids, *own["tokens"]] for ids, own in zip(PROMPTS, exact, strict=True)]
            return generate_with_own_experts(checkpoint, prompts=texts, rows_dtype=torch.bfloat16)

        tables = attached_tables(store, self.sandbox_process, BLOCKS)
        for got in generate_with_functions(store, tables, self.folder):
            errors = prompt_errors(got, exact)
            assert max(errors) <= BF16_TOLERANCE
            assert mean(errors) <= mean(own_errors)
            assert_equal(
                got,
                exact,
                BF16_TOLERANCE,
                near_tie=2 * BF16_TOLERANCE,
                with_rounded_rows=with_rounded_rows,
            )
        detach(tables, self.sandbox_process)


@pytest.fixture
def comparison(sandbox_process: SandboxProcess, tmp_path: Path) -> Comparison:
    return Comparison(sandbox_process, tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_logprobs_equal_those_of_vllms_own_experts(
    family: str, comparison: Comparison
) -> None:
    comparison.check(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_int8_functions_equal_vllms_own_experts_with_the_same_weights(
    family: str, comparison: Comparison
) -> None:
    comparison.check(
        family,
        quantization=QuantizationEntry("int8", "none"),
        tolerance=INT8_TOLERANCE,
        near_tie=2 * INT8_TOLERANCE,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_functions_are_as_exact_as_vllm_in_bfloat16(
    family: str, comparison: Comparison
) -> None:
    comparison.check_bfloat16(family)


def test_int8_weights_of_the_router_are_dequantised(comparison: Comparison) -> None:
    comparison.check(
        "qwen2_moe",
        quantization=QuantizationEntry("int8", "int8"),
        tolerance=INT8_TOLERANCE,
        near_tie=2 * INT8_TOLERANCE,
    )


def test_compiled_code_generates_the_same_and_is_loaded_the_second_time(
    comparison: Comparison,
) -> None:
    cache = {"VLLM_CACHE_ROOT": str(comparison.folder / "cache")}
    must_load = {**cache, "VLLM_FORCE_AOT_LOAD": "1"}
    comparison.check("qwen2_moe", blocks=BLOCKS[-1:], is_compiled=True, runs=[cache, must_load])


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="each worker needs a core")
def test_workers_that_share_layers_call_each_function_once(comparison: Comparison) -> None:
    comparison.check("qwen2_moe", blocks=BLOCKS[:1], workers=2, near_tie=2 * TOLERANCE)
