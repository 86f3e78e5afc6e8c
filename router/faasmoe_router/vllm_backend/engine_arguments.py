"""vLLM's command line, from the router's settings and the store."""

from __future__ import annotations

import json
import logging
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager
from vllm.utils.argparse_utils import FlexibleArgumentParser

from faasmoe_contracts.store import Store
from faasmoe_router.config import PREFIX, RouterConfig
from faasmoe_router.errors import RouterConfigError
from faasmoe_router.vllm_backend.parsers import Parsers, read_chat_templates, select_parsers
from faasmoe_router.vllm_backend.quantization import METHOD
from faasmoe_router.vllm_backend.tool_template import with_tools
from faasmoe_router.vllm_backend.weights import LOAD_FORMAT
from faasmoe_transformers.onednn import is_fast_on_cpu

logger = logging.getLogger(__name__)

DEFAULT_MODEL_LEN = 8192
DEFAULT_KV_CACHE_BYTES = 2 << 30
NO_GRAPHS = {"cudagraph_mode": "NONE"}
"""On a GPU: a CUDA graph must not span a call. Compiled code may, as calls are opaque to it."""
OWN_RENDERERS = ("GptOssForCausalLM",)
"""Families whose chats vLLM renders without a template."""
CPU_WORKER = "faasmoe_router.vllm_backend.cpu_worker.FunctionCpuWorker"
WORKER_EXTENSION = "faasmoe_router.vllm_backend.worker_extension.FunctionWorkerExtension"


def parse_engine_arguments(
    config: RouterConfig, store: Store, device: str, *, model_name: str, fingerprint: str
) -> Namespace:
    """Return vLLM's arguments, for its engine and its OpenAI app.

    Args:
        config: the router's settings.
        store: the prepared model.
        device: cpu or cuda, which vLLM computes on.
        model_name: name that requests give.
        fingerprint: `system_fingerprint` of responses.

    Raises:
        RouterConfigError: a setting does not fit the model, the device or another setting.
    """
    parsers = _parsers(config, store)
    values = {
        **_values(config, store, device, model_name, fingerprint),
        "tool_call_parser": parsers.tool_call,
        "reasoning_parser": parsers.reasoning,
    }
    words = [
        f"--{name.replace('_', '-')}={value}" for name, value in values.items() if value is not None
    ]
    arguments = config.engine_args
    is_eager = device == "cpu" if arguments.enforce_eager is None else arguments.enforce_eager
    words += ["--enforce-eager"] * is_eager
    words += ["--enable-auto-tool-choice"] * (parsers.tool_call is not None)
    if arguments.enable_prefix_caching is not None:
        words.append(f"--{'' if arguments.enable_prefix_caching else 'no-'}enable-prefix-caching")
    parser = make_arg_parser(FlexibleArgumentParser())
    parsed: Namespace = parser.parse_args([*words, "--enable-prompt-tokens-details"])
    return parsed


def _values(
    config: RouterConfig, store: Store, device: str, model_name: str, fingerprint: str
) -> dict[str, Any]:
    arguments = config.engine_args
    folder = store.path / "model"
    shares_layers = (arguments.tensor_parallel_size or 1) > 1  # with cores bound to each worker
    overrides = {"quantization_config": {"quant_method": METHOD}}
    return {
        "model": folder,
        "served_model_name": model_name,
        "quantization": METHOD,
        "load_format": LOAD_FORMAT,
        "hf_overrides": json.dumps(overrides),
        "dtype": compute_dtype(config.dtype, store.manifest.model.dtype, device),
        "max_model_len": _max_model_len(config, store),
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "kv_cache_memory_bytes": _kv_cache_bytes(config, device),
        "gpu_memory_utilization": arguments.gpu_memory_utilization,
        "max_logprobs": arguments.max_logprobs,
        "tensor_parallel_size": arguments.tensor_parallel_size,
        "scheduling_policy": "priority",
        "tool_strict_level": "parameter",  # arguments of forced calls conform to their schemas
        "generation_config": "auto" if config.generation_config == "auto" else "vllm",
        "worker_extension_cls": WORKER_EXTENSION,
        "worker_cls": CPU_WORKER if device == "cpu" and not shares_layers else None,
        "fingerprint_mode": "custom",
        "fingerprint_value": fingerprint,
        "chat_template": _chat_template(folder, store.manifest.model.architecture),
        "compilation_config": json.dumps(NO_GRAPHS) if device == "cuda" else None,
    }


def compute_dtype(setting: str, stored: str, device: str) -> str:
    """Return the dtype to compute in: the store's, but float32 where a CPU is slow in that.

    Args:
        setting: a dtype, or auto.
        stored: dtype of the store.
        device: cpu or cuda.
    """
    if setting != "auto":
        return setting
    return "float32" if device == "cpu" and not is_fast_on_cpu(getattr(torch, stored)) else stored


def _max_model_len(config: RouterConfig, store: Store) -> int:
    longest = store.manifest.model.max_position_embeddings
    if config.max_model_len is not None and config.max_model_len > longest:
        raise RouterConfigError(
            f"{PREFIX}MAX_MODEL_LEN: got {config.max_model_len}, expected at most {longest}, "
            "the model's context length"
        )
    return config.max_model_len or min(longest, DEFAULT_MODEL_LEN)


def _kv_cache_bytes(config: RouterConfig, device: str) -> int | None:
    """Return the size of the KV cache; None for what vLLM finds free on a GPU."""
    part = config.engine_args.gpu_memory_utilization
    if part is not None and (device == "cpu" or config.kv_cache_bytes is not None):
        other = "with device cpu" if device == "cpu" else f"beside {PREFIX}KV_CACHE_BYTES"
        raise RouterConfigError(
            f"{PREFIX}ENGINE_ARGS: gpu_memory_utilization: got {part:g}, expected none {other}"
        )
    if config.kv_cache_bytes is None and device == "cpu":
        return DEFAULT_KV_CACHE_BYTES
    return config.kv_cache_bytes


def _parsers(config: RouterConfig, store: Store) -> Parsers:
    """Return the model's parsers; raises RouterConfigError for one that vLLM has not."""
    templates = "\n".join(read_chat_templates(store.path / "model"))
    parsers = select_parsers(config.engine_args, store.manifest.model.architecture, templates)
    _check_parser("tool_call_parser", parsers.tool_call, ToolParserManager)
    _check_parser("reasoning_parser", parsers.reasoning, ReasoningParserManager)
    if parsers != Parsers(None, None):
        logger.info("Parsers of %s: %s", store.manifest.model.architecture, parsers)
    return parsers


def _check_parser(name: str, parser: str | None, manager: Any) -> None:
    """Raise RouterConfigError unless vLLM has a parser of that name."""
    known = manager.list_registered()
    if parser is not None and parser not in known:
        raise RouterConfigError(
            f"{PREFIX}ENGINE_ARGS: {name}: got {parser}, expected one of {', '.join(sorted(known))}"
        )


def _chat_template(folder: Path, architecture: str) -> str | Path | None:
    """Return the chat template for vLLM, text or its file; None for those of the tokenizer."""
    templates = read_chat_templates(folder)
    if len(templates) == 1 and architecture not in OWN_RENDERERS:
        extended = with_tools(templates[0])
        if extended is not None:
            return extended
    path = folder / "chat_template.jinja"
    return path if path.exists() else None
