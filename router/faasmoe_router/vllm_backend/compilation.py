"""What vLLM compiles, and where it keeps that: the pieces between calls, beside the store.

On a CPU, vLLM compiles a model as one graph, whose cache does not survive the process: each start
traces and compiles all layers again. Cut at attention and at calls, the pieces of all layers are
equal, compiled once, and found in vLLM's cache at the next start, without tracing.
"""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path

from vllm.config import CompilationMode, VllmConfig
from vllm.config.compilation import PassConfig

from faasmoe_router.vllm_backend.operators import NAMES

CACHE_VARIABLE = "VLLM_CACHE_ROOT"
CACHE_SUFFIX = ".vllm"
PASS_PREFIXES = ("fuse_", "enable_", "eliminate_")
"""Of the names of vLLM's passes over compiled code."""


def compile_between_calls(config: VllmConfig) -> None:
    """Set that the pieces between calls are compiled, and kept; nothing if vLLM compiles nothing.

    Args:
        config: vLLM's configuration, complete.
    """
    compilation = config.compilation_config
    if compilation.mode is CompilationMode.DYNAMO_TRACE_ONCE:  # what vLLM sets on a CPU
        compilation.mode = CompilationMode.VLLM_COMPILE
        compilation.splitting_ops = None  # vLLM's own, which are none in the other mode
        compilation.pass_config = PassConfig(**_no_passes())  # kernels of GPUs
        compilation.set_splitting_ops_for_v1(config.parallel_config.all2all_backend)
    if compilation.mode is CompilationMode.VLLM_COMPILE:
        ours = [f"vllm::{name}" for name in NAMES]
        compilation.splitting_ops = [*(compilation.splitting_ops or []), *ours]


def _no_passes() -> dict[str, bool]:
    """Return all of vLLM's passes, each turned off."""
    return {
        field.name: False for field in fields(PassConfig) if field.name.startswith(PASS_PREFIXES)
    }


def keep_beside_store(store: Path) -> None:
    """Have vLLM keep compiled code beside a store; in its own folder where nothing can be written.

    Args:
        store: the store's folder.
    """
    folder = cache_folder(store)
    if CACHE_VARIABLE not in os.environ and os.access(folder.parent, os.W_OK):
        os.environ[CACHE_VARIABLE] = str(folder)


def cache_folder(store: Path) -> Path:
    """Return the folder of the compiled code of a store."""
    return store.with_name(store.name + CACHE_SUFFIX)
