"""The worker that is compared with: transformers' continuous batching, all in one process.

Uses every core, decodes greedily, has the same cache as the other side. Each run names the experts
implementation.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from benchmarks.decoding import ResourceReading, RunRecorder, StepOutput
from benchmarks.resource_usage import CpuClock
from benchmarks.worker import RUN_TIMEOUT_S, CommandHandler, serve_commands
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching.continuous_api import OutputRouter

from faasmoe_contracts.store import MANIFEST_NAME, Store
from faasmoe_expert.device import resolve_device
from faasmoe_router.engine.cache_config import TOKENS_PER_PAGE, EngineLimits, KVCacheGeometry
from faasmoe_router.transformers_backend.attention import select_attention_implementation
from faasmoe_router.transformers_backend.continuous_batching import NO_EOS_TOKEN_ID


class _RecordingOutputRouter(OutputRouter):  # type: ignore[misc]
    """Hands a step's outputs to the recorder, on the engine's thread."""

    def __init__(self, recorder: RunRecorder) -> None:
        super().__init__()
        self._recorder = recorder

    def deliver(self, output: StepOutput) -> None:
        self.deliver_batch([output])

    def deliver_batch(self, outputs: Sequence[StepOutput]) -> None:
        self._recorder.record_step(outputs)


class TransformersWorker:
    """The whole model in this process."""

    def __init__(
        self, source: Path, limits: EngineLimits, device: torch.device, *, graphs: bool
    ) -> None:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        clock = CpuClock([os.getpid()])
        self._recorder = RunRecorder(lambda: ResourceReading(time.perf_counter(), clock.read_s()))
        self._model = _load_model(source, device)
        select_attention_implementation(self._model)
        self._manager = self._model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=NO_EOS_TOKEN_ID),
            continuous_batching_config=_continuous_batching_config(
                limits, KVCacheGeometry.from_model(self._model), graphs=graphs
            ),
        )
        self._manager.output_router = _RecordingOutputRouter(self._recorder)
        self._manager.start()

    def handle(self, command: dict[str, Any]) -> dict[str, Any]:
        """Run a batch."""
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
        """End the engine's thread."""
        self._manager.stop(block=True, timeout=10.0, hard_stop=True)


def _load_model(source: Path, device: torch.device) -> Any:
    """Return the whole model of a checkpoint or of a prepared store."""
    if (source / MANIFEST_NAME).exists():
        return load_full_model(Store.open(source), device)
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    return model.to(device).eval()


def load_full_model(store: Store, device: torch.device) -> Any:
    """Return the whole model of a store, the experts as transformers has them."""
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
    """Serve until stdin ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("source", type=Path, help="checkpoint, or prepared store")
    parser.add_argument("--max-model-len", type=int, required=True)
    parser.add_argument("--max-num-seqs", type=int, default=32)
    parser.add_argument("--kv-cache-bytes", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--graphs", action="store_true", help="CUDA graphs around each step")
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
        for side in workers:
            side.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
