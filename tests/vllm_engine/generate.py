"""Runs in vLLM's environment: generates with vLLM's own experts or with functions, prints JSON.

`python generate.py REQUEST` with a JSON object: `checkpoint` or `store`, `tables` (routing tables
to use in turn, with a store), `prompts` (token ids), `max_tokens`, `dtype` (float32 if omitted),
`rows_dtype` (to which vLLM's own experts round their inputs; `dtype` if omitted), `compile`,
`workers` (that share each layer; with several, the table is the one in FAASMOE_TABLE).
The last line of the output is a list with, for each table, the outputs of the prompts: token ids
and log-probabilities, and those of the prompt's own tokens; `tops` and `prompt_tops` have the
log-probabilities of the likeliest tokens at each position by token id. With a store, it is followed
by the dispatcher's metrics, and the names of the parameters that are mapped from files.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

TOPS = 20  # vLLM's maximum by default
OPTIONS: dict[str, Any] = {
    "max_model_len": 128,
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": 64 << 20,
    "enable_prefix_caching": False,
    "skip_tokenizer_init": True,
}
FUNCTIONS: dict[str, Any] = {
    "worker_extension_cls": "faasmoe_router.vllm_backend.worker_extension.FunctionWorkerExtension",
    "quantization": "faasmoe",
    "load_format": "faasmoe",
    "hf_overrides": {"quantization_config": {"quant_method": "faasmoe"}},
}


ONE_WORKER = {"worker_cls": "faasmoe_router.vllm_backend.cpu_worker.FunctionCpuWorker"}


def main() -> None:
    request = json.loads(sys.argv[1])
    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    params = SamplingParams(
        temperature=0,
        max_tokens=request["max_tokens"],
        ignore_eos=True,
        logprobs=TOPS,
        prompt_logprobs=TOPS,
        detokenize=False,
    )

    def generate(engine: LLMEngine) -> list[dict[str, Any]]:
        for number, ids in enumerate(request["prompts"]):
            engine.add_request(f"{number}", {"prompt_token_ids": ids}, params)
        outputs = {}
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    outputs[int(output.request_id.split("-")[0])] = _described(output)
        return [output for _, output in sorted(outputs.items())]

    n_workers = request.get("workers", 1)
    options = OPTIONS | {
        "dtype": request.get("dtype", "float32"),
        "enforce_eager": not request.get("compile"),
        "tensor_parallel_size": n_workers,
    }
    if "checkpoint" in request:
        config = EngineArgs(request["checkpoint"], **options).create_engine_config()
        engine = LLMEngine.from_vllm_config(config)
        if dtype := request.get("rows_dtype"):
            engine.apply_model(lambda model: _round_rows(model, dtype))
        print("\n" + json.dumps([generate(engine)]))
        return
    from faasmoe_contracts.routing_table import RoutingTable
    from faasmoe_router.vllm_backend.expert_calls import ExpertCalls, current_calls

    options |= FUNCTIONS | (ONE_WORKER if n_workers == 1 else {})
    config = EngineArgs(f"{request['store']}/model", **options).create_engine_config()
    engine = LLMEngine.from_vllm_config(config)
    results = []
    for table in request["tables"]:
        if n_workers == 1:
            calls = current_calls()
            assert isinstance(calls, ExpertCalls)
            calls.dispatcher.replace_table(RoutingTable.from_json(table))
        results.append(generate(engine))
    metrics = "".join(engine.collective_rpc("faasmoe_metrics"))
    mapped = engine.apply_model(_mapped_parameters)[0] if n_workers == 1 else []
    print("\n" + json.dumps([results, metrics, mapped]))


def _described(output: Any) -> dict[str, Any]:
    choice = output.outputs[0]
    chosen = list(zip(choice.token_ids, choice.logprobs, strict=True))
    given = list(zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True))
    return {
        "tokens": list(choice.token_ids),
        "logprobs": [position[token].logprob for token, position in chosen],
        "tops": [_by_token(position) for _, position in chosen],
        "prompt_logprobs": [position[token].logprob for token, position in given],
        "prompt_tops": [_by_token(position) for _, position in given],
    }


def _round_rows(model: Any, dtype: str) -> None:
    """Have the routed experts of a model round their inputs to a dtype."""
    import torch
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    for layer in model.modules():
        if isinstance(layer, RoutedExperts):
            method, compute = layer.quant_method, layer.quant_method.apply

            def apply(*, x: Any, compute: Any = compute, **others: Any) -> Any:
                return compute(x=x.to(getattr(torch, dtype)).to(x.dtype), **others)

            method.apply = apply


def _mapped_parameters(model: Any) -> list[str]:
    from faasmoe_transformers.tensor_pages import is_mapped_file

    return [n for n, tensor in model.named_parameters() if len(tensor) and is_mapped_file(tensor)]


def _by_token(position: Any) -> dict[str, float]:
    return {str(token): entry.logprob for token, entry in position.items()}


if __name__ == "__main__":
    main()
