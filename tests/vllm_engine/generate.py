"""Runs in vLLM's environment: generates with vLLM's own experts or with functions, prints JSON.

`python generate.py REQUEST` with a JSON object: `checkpoint` or `store`, `tables` (routing tables
to use in turn, with a store), `prompts` (token ids), `max_tokens`, `compile`. The last line of the
output is a list with, for each table, the outputs of the prompts: token ids and log-probabilities,
and those of the prompt's own tokens. With a store, it is followed by the dispatcher's metrics.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 128,
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": 64 << 20,
    "enable_prefix_caching": False,
    "skip_tokenizer_init": True,
}
FUNCTIONS: dict[str, Any] = {
    "quantization": "faasmoe",
    "load_format": "faasmoe",
    "hf_overrides": {"quantization_config": {"quant_method": "faasmoe"}},
}


def main() -> None:
    request = json.loads(sys.argv[1])
    from vllm import LLM, SamplingParams

    options = OPTIONS | {"enforce_eager": not request.get("compile")}
    params = SamplingParams(
        temperature=0,
        max_tokens=request["max_tokens"],
        ignore_eos=True,
        logprobs=1,
        prompt_logprobs=1,
        detokenize=False,
    )
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]

    def generate(llm: LLM) -> list[dict[str, Any]]:
        return [_described(output) for output in llm.generate(prompts, params, use_tqdm=False)]

    if "checkpoint" in request:
        print("\n" + json.dumps([generate(LLM(request["checkpoint"], **options))]))
        return
    llm = LLM(f"{request['store']}/model", **FUNCTIONS, **options)
    from faasmoe_contracts.routing_table import RoutingTable
    from faasmoe_router.vllm_backend.expert_calls import current_calls

    results = []
    for table in request["tables"]:
        current_calls().dispatcher.replace_table(RoutingTable.from_json(table))
        results.append(generate(llm))
    print("\n" + json.dumps([results, current_calls().metrics_text().decode()]))


def _described(output: Any) -> dict[str, Any]:
    choice = output.outputs[0]
    chosen = zip(choice.token_ids, choice.logprobs, strict=True)
    given = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    return {
        "tokens": list(choice.token_ids),
        "logprobs": [position[token].logprob for token, position in chosen],
        "prompt_logprobs": [position[token].logprob for token, position in given],
    }


if __name__ == "__main__":
    main()
