"""Selects the lean kernel, if any, that computes the same function as an experts module.

Candidates are read off the module's form and then tested: kernel and family's own forward on small
random weights, in float32. A module without an equivalent kernel is served by the family's class.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from faasmoe_expert.functions.kernels import (
    ACTIVATIONS,
    CLAMPED_SWIGLU,
    KernelSpec,
    RoutedPairs,
    gated_per_pair,
)
from faasmoe_transformers.model_skeleton import ExpertsForm, ExpertsModule, eager_copy

logger = logging.getLogger(__name__)

_N_EXPERTS, _HIDDEN_SIZE, _INTERMEDIATE_SIZE, _N_TOKENS, _TOP_K = 3, 24, 16, 12, 2
# Small inputs, ordinary ones, and inputs that reach the clamps that some families apply.
_INPUT_SCALES = (0.05, 1.0, 30.0)
_RELATIVE_TOLERANCE = 1e-5


def select_kernel(experts: ExpertsModule) -> dict[str, Any] | None:
    """Return the spec (JSON) of the kernel equivalent to the module; None if there is none."""
    for spec in candidate_kernels(experts.module):
        if is_equivalent(experts.module, spec):
            return KernelSpec.from_json(spec).to_json()
    return None


def candidate_kernels(module: Any) -> Iterator[dict[str, Any]]:
    """Yield the specs (JSON) that the form of an experts module allows, likeliest first."""
    form = ExpertsForm.of(module)
    base_spec = {
        "name": "gated" if form.is_gated else "plain",
        "transposed": form.is_transposed,
        "interleaved": form.is_interleaved,
        "bias": form.is_biased,
    }
    if {name for name, _ in module.named_parameters()} == set(_parameter_shapes(base_spec)):
        if form.is_gated and (parameters := _clamp_parameters(module)) is not None:
            yield {**base_spec, "activation": CLAMPED_SWIGLU, **parameters}
        for activation in _candidate_activations(module):
            yield {**base_spec, "activation": activation}


def is_equivalent(module: Any, spec: Mapping[str, Any]) -> bool:
    """Tell whether the kernel and the module's own forward give the same outputs."""
    try:
        small_module = _small_copy(module, spec)
        return all(_is_equivalent_at(scale, small_module, spec) for scale in _INPUT_SCALES)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        logger.info("%s: no lean kernel: %s", type(module).__name__, error)
        return False


def _is_equivalent_at(scale: float, module: Any, spec: Mapping[str, Any]) -> bool:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(_N_TOKENS, _HIDDEN_SIZE, generator=generator) * scale  # [T, H]
    top_k_index = (
        torch.rand(_N_TOKENS, _N_EXPERTS, generator=generator).topk(_TOP_K).indices
    )  # [T, k]
    top_k_weights = torch.rand(_N_TOKENS, _TOP_K, generator=generator)  # [T, k]
    with torch.no_grad():
        expected = module(hidden, top_k_index, top_k_weights)  # [T, H]
        pairs = RoutedPairs(
            row=np.arange(_N_TOKENS, dtype=np.int32).repeat(_TOP_K),  # [P]
            expert=top_k_index.reshape(-1).int().numpy(),  # [P]
            weight=top_k_weights.reshape(-1),  # [P]
        )
        parameters = dict(module.named_parameters())
        per_pair = gated_per_pair(KernelSpec.from_json(spec), parameters, hidden, pairs)  # [P, H]
    actual = per_pair.view(_N_TOKENS, _TOP_K, _HIDDEN_SIZE).sum(1)  # [T, H]
    error = (actual - expected).abs().max()
    return bool(error <= _RELATIVE_TOLERANCE * expected.abs().max().clamp(min=1e-6))


def _small_copy(module: Any, spec: Mapping[str, Any]) -> Any:
    """Return a copy of the module on the CPU with a few small random experts."""
    small = eager_copy(module)
    for attribute, size in _small_sizes(module, spec).items():
        setattr(small, attribute, size)
    for name, shape in _parameter_shapes(spec).items():
        generator = torch.Generator().manual_seed(len(name))
        value = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        setattr(small, name, nn.Parameter(value, requires_grad=False))
    return small.float().eval()


def _small_sizes(module: Any, spec: Mapping[str, Any]) -> dict[str, int]:
    """Return the module's attributes that hold one of its sizes, with the small size."""
    down = module.down_proj.shape  # [E, H, I], or [E, I, H] if transposed
    hidden, inter = (down[2], down[1]) if spec["transposed"] else (down[1], down[2])
    small = {2 * inter: 2 * _INTERMEDIATE_SIZE, inter: _INTERMEDIATE_SIZE, hidden: _HIDDEN_SIZE}
    attributes = {
        name: small[value]
        for name, value in vars(module).items()
        if isinstance(value, int) and not isinstance(value, bool) and value in small
    }
    return attributes | {"num_experts": _N_EXPERTS}


def _parameter_shapes(spec: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    is_gated = spec["name"] == "gated"
    up_name, width = (
        ("gate_up_proj", 2 * _INTERMEDIATE_SIZE) if is_gated else ("up_proj", _INTERMEDIATE_SIZE)
    )
    up, down = (width, _HIDDEN_SIZE), (_HIDDEN_SIZE, _INTERMEDIATE_SIZE)
    if spec["transposed"]:
        up, down = up[::-1], down[::-1]
    shapes: dict[str, tuple[int, ...]] = {
        up_name: (_N_EXPERTS, *up),
        "down_proj": (_N_EXPERTS, *down),
    }
    if spec["bias"]:
        shapes |= {
            f"{up_name}_bias": (_N_EXPERTS, width),
            "down_proj_bias": (_N_EXPERTS, _HIDDEN_SIZE),
        }
    return shapes


def _clamp_parameters(module: Any) -> dict[str, float] | None:
    """Return alpha and limit of GPT-OSS's activation; None if the module has no such attributes."""
    values = {name: getattr(module, name, None) for name in ("alpha", "limit")}
    numbers = {name: float(v) for name, v in values.items() if isinstance(v, int | float) and v > 0}
    return numbers if len(numbers) == len(values) else None


def _candidate_activations(module: Any) -> list[str]:
    """Return the names of activations to test, those that the config names first."""
    named = [getattr(module.config, name, None) for name in ("hidden_act", "hidden_activation")]
    return [name for name in dict.fromkeys((*named, *ACTIVATIONS)) if name in ACTIVATIONS]
