"""Benchmark worker with the baseline: transformers' continuous batching in one process.

It uses all cores, decodes greedily and has a KV cache of the same size as the router. Each command
names the experts implementation to use.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from benchmarks.decoding import ResourceReading, RunRecorder
from benchmarks.resource_usage import CpuClock
from benchmarks.worker import RUN_TIMEOUT_S, CommandHandler, serve_commands
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.generation import ContinuousBatchingConfig

from faasmoe_contracts.store import MANIFEST_NAME, Store
from faasmoe_expert.device import resolve_device
from faasmoe_router.engine.batcher import TOKENS_PER_PAGE, EngineLimits, KVCacheGeometry
from faasmoe_transformers.attention import select_attention_implementation
from faasmoe_transformers.continuous_batching import NO_EOS_TOKEN_ID, create_plain_manager


class TransformersWorker:
    """Generates with the whole model in this process.

    Args:
        source: checkpoint or store.
        limits: limits of the engine, which determine the size of the KV cache.
        device: where the model runs.
        graphs: whether to use CUDA graphs.
    """

    def __init__(
        self, source: Path, limits: EngineLimits, device: torch.device, *, graphs: bool
    ) -> None:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        clock = CpuClock([os.getpid()])
        self._recorder = RunRecorder(lambda: ResourceReading(time.perf_counter(), clock.read_s()))
        self._model = _load_model(source, device)
        select_attention_implementation(self._model)
        self._manager = create_plain_manager(
            self._model,
            _continuous_batching_config(
                limits, KVCacheGeometry.from_model(self._model), graphs=graphs
            ),
            self._recorder.record_step,
        )
        self._manager.start()

    def handle(self, command: dict[str, Any]) -> dict[str, Any]:
        """Run a batch with the experts implementation of the command."""
        self._model.set_experts_implementation(command["implementation"])
        prompts, max_tokens = command["prompts"], int(command["max_tokens"])
        names = self._recorder.start(len(prompts), max_tokens=max_tokens)
        for name, prompt in zip(names, prompts, strict=True):
            self._manager.add_request(
                prompt,
                request_id=name,
                max_new_tokens=max_tokens,
                streaming=True,
                eos_token_id=NO_EOS_TOKEN_ID,
            )
        return self._recorder.wait(RUN_TIMEOUT_S).to_json()

    def close(self) -> None:
        """Stop the engine thread."""
        self._manager.stop(block=True, timeout=10.0, hard_stop=True)


def _load_model(source: Path, device: torch.device) -> Any:
    """Return the whole model of a checkpoint or a store."""
    if (source / MANIFEST_NAME).exists():
        return load_full_model(Store.open(source), device)
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    return model.to(device).eval()


def load_full_model(store: Store, device: torch.device) -> Any:
    """Return the whole model of a store with transformers' own experts modules."""
    config = AutoConfig.from_pretrained(store.path / "model")
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=getattr(torch, store.manifest.model.dtype),
            attn_implementation="sdpa",
        )
    for path in store.router_files():
        model.load_state_dict(load_file(path, device=str(device)), strict=False, assign=True)
    for layer in store.manifest.layers:
        experts = load_file(store.path / layer.file, device=str(device))
        model.get_submodule(layer.name).load_state_dict(experts, assign=True)
    model.tie_weights()
    return model.to(device).eval().requires_grad_(False)


def _continuous_batching_config(
    limits: EngineLimits, geometry: KVCacheGeometry, *, graphs: bool
) -> ContinuousBatchingConfig:
    return ContinuousBatchingConfig(
        page_size=TOKENS_PER_PAGE,
        num_blocks=limits.n_pages(geometry),
        max_batch_tokens=limits.max_num_batched_tokens,
        max_requests_per_batch=limits.max_num_seqs,
        allow_block_sharing=False,
        use_async_batching=False,
        use_cuda_graph=graphs,
        auto_switch_to_flash=False,
    )


def main() -> int:
    """Serve commands until stdin is closed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("source", type=Path, help="checkpoint or store")
    parser.add_argument("--max-model-len", type=int, required=True)
    parser.add_argument("--max-num-seqs", type=int, default=32)
    parser.add_argument("--kv-cache-bytes", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--graphs", action="store_true", help="use CUDA graphs")
    arguments = parser.parse_args()
    workers: list[TransformersWorker] = []

    def make_handler() -> CommandHandler:
        limits = EngineLimits(
            max_model_len=arguments.max_model_len,
            max_num_seqs=arguments.max_num_seqs,
            kv_cache_bytes=arguments.kv_cache_bytes,
        )
        device = resolve_device(arguments.device)
        workers.append(
            TransformersWorker(arguments.source, limits, device, graphs=arguments.graphs)
        )
        return workers[0].handle

    try:
        serve_commands(make_handler)
    finally:
        for worker in workers:
            worker.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
