"""Which lean kernel, if any, computes what an experts module computes.

A candidate is read off the module's attributes and then tried: the family's own forward and the
kernel on small random weights, in float32. Whatever does not agree is served by the family's class.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from copy import copy, deepcopy
from typing import Any

import numpy as np
import torch
from torch import nn

from faasmoe_expert.functions.kernels import ACTIVATIONS, KernelSpec, run_gated
from faasmoe_expert.functions.pairs import Pairs
from faasmoe_router.checkpoint.architecture import ExpertsModule

_log = logging.getLogger(__name__)
_EXPERTS, _HIDDEN, _INTER, _TOKENS, _TOP_K = 3, 24, 16, 12, 2
# Small inputs, ordinary ones, and some large enough to reach the clamps that some families apply.
_SCALES = (0.05, 1.0, 30.0)
_TOLERANCE = 1e-5


def agreeing_kernel(experts: ExpertsModule) -> dict[str, Any] | None:
    """Return the kernel spec (JSON) that agrees with the module, or None."""
    for spec in candidates(experts.module):
        if agrees(experts.module, spec):
            return KernelSpec.from_json(spec).to_json()
    return None


def candidates(module: Any) -> Iterator[dict[str, Any]]:
    """Yield the specs that the module's attributes allow."""
    form = {
        "name": "gated" if module.has_gate else "plain",
        "transposed": bool(module.is_transposed),
        "interleaved": bool(module.has_gate and not module.is_concatenated),
        "bias": bool(module.has_bias),
    }
    if {name for name, _ in module.named_parameters()} == set(_shapes(form)):
        for activation in _activations(module):
            yield {**form, "activation": activation}


def agrees(module: Any, spec: Mapping[str, Any]) -> bool:
    """Tell whether the kernel gives what the module's own forward gives."""
    try:
        small = _shrunk(module, spec)
        return all(_agrees_at(scale, small, spec) for scale in _SCALES)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        _log.info("%s: no lean kernel: %s", type(module).__name__, error)
        return False


def _agrees_at(scale: float, module: Any, spec: Mapping[str, Any]) -> bool:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(_TOKENS, _HIDDEN, generator=generator) * scale  # [T, H]
    index = torch.rand(_TOKENS, _EXPERTS, generator=generator).topk(_TOP_K).indices  # [T, k]
    weights = torch.rand(_TOKENS, _TOP_K, generator=generator)  # [T, k]
    with torch.no_grad():
        expected = module(hidden, index, weights)  # [T, H]
        pairs = Pairs(
            row=np.arange(_TOKENS, dtype=np.int32).repeat(_TOP_K),  # [P]
            expert=index.reshape(-1).int().numpy(),  # [P]
            weight=weights.reshape(-1),  # [P]
        )
        parameters = dict(module.named_parameters())
        each = run_gated(KernelSpec.from_json(spec), parameters, hidden, pairs)  # [P, H]
    got = each.view(_TOKENS, _TOP_K, _HIDDEN).sum(1)  # [T, H]
    error = (got - expected).abs().max()
    return bool(error <= _TOLERANCE * expected.abs().max().clamp(min=1e-6))


def _shrunk(module: Any, spec: Mapping[str, Any]) -> Any:
    """Return a copy of the module on the CPU with few small random experts."""
    small: Any = deepcopy(module)
    small.config = copy(module.config)
    small.config._experts_implementation = "eager"
    for attribute, size in _sizes(module, spec).items():
        setattr(small, attribute, size)
    for name, shape in _shapes(spec).items():
        generator = torch.Generator().manual_seed(len(name))
        value = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        setattr(small, name, nn.Parameter(value, requires_grad=False))
    return small.float().eval()


def _sizes(module: Any, spec: Mapping[str, Any]) -> dict[str, int]:
    """Map the module's attributes that hold one of its sizes to the small size."""
    down = module.down_proj.shape  # [E, H, I], or [E, I, H] if transposed
    hidden, inter = (down[2], down[1]) if spec["transposed"] else (down[1], down[2])
    small = {2 * inter: 2 * _INTER, inter: _INTER, hidden: _HIDDEN}
    found = {
        name: small[value]
        for name, value in vars(module).items()
        if isinstance(value, int) and not isinstance(value, bool) and value in small
    }
    return found | {"num_experts": _EXPERTS}


def _shapes(spec: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    gated = spec["name"] == "gated"
    first, width = ("gate_up_proj", 2 * _INTER) if gated else ("up_proj", _INTER)
    up, down = (width, _HIDDEN), (_HIDDEN, _INTER)
    if spec["transposed"]:
        up, down = up[::-1], down[::-1]
    shapes: dict[str, tuple[int, ...]] = {
        first: (_EXPERTS, *up),
        "down_proj": (_EXPERTS, *down),
    }
    if spec["bias"]:
        shapes |= {f"{first}_bias": (_EXPERTS, width), "down_proj_bias": (_EXPERTS, _HIDDEN)}
    return shapes


def _activations(module: Any) -> list[str]:
    """Return the names of activations to try, those that the config names first."""
    named = [getattr(module.config, name, None) for name in ("hidden_act", "hidden_activation")]
    return [name for name in dict.fromkeys((*named, *ACTIVATIONS)) if name in ACTIVATIONS]
