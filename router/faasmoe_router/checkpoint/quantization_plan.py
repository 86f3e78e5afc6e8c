"""Decides which parameters of a model are quantised, and how. Pure: reads shapes, no weights.

Experts: every stacked projection. The router: the weights of its linear layers, without those that
are small and decide much (gates), without embeddings and norms, and without weights that several
modules share, such as a tied LM head. With int4, the LM head is int8: its errors reach every
logit, and llama.cpp's 4-bit formats keep it at 6 or 8 bits too.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping

from torch import nn

from faasmoe_contracts.store import QuantizationEntry, TensorQuantization
from faasmoe_router.checkpoint.quantizer import choose_quantization
from faasmoe_transformers.model_skeleton import ExpertsForm, ModelSkeleton

logger = logging.getLogger(__name__)

_GATE_NAME = re.compile(r"(^|_)gate$|router")


def plan_quantization(
    skeleton: ModelSkeleton,
    quantization: QuantizationEntry,
    *,
    unquantizable: Collection[str],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, TensorQuantization]:
    """Return how each quantised parameter is stored, by its name in the model.

    Args:
        skeleton: the model.
        quantization: what to quantise.
        unquantizable: parameters of the router that are stored as they are.
        shapes: shapes of the stored parameters by name.
    """
    planned: dict[str, TensorQuantization] = {}
    if quantization.experts != "none":
        planned |= _plan_experts(skeleton, quantization.experts, shapes)
    if quantization.router != "none":
        planned |= _plan_router(skeleton, quantization.router, shapes, unquantizable)
    return planned


def _plan_experts(
    skeleton: ModelSkeleton, scheme: str, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, TensorQuantization]:
    planned: dict[str, TensorQuantization] = {}
    kept: list[str] = []
    for experts in skeleton.experts_modules:
        is_transposed = ExpertsForm.of(experts.module).is_transposed
        for local, parameter in experts.parameters.items():
            name = f"{experts.name}.{local}"
            if parameter.dim() != 3 or name not in shapes:
                continue
            chosen = choose_quantization(scheme, shapes[name], transposed=is_transposed)
            if chosen is None:
                kept.append(name)
            else:
                planned[name] = chosen
    if kept:
        logger.warning(
            "%d expert parameters are not quantised, their columns do not fit %s, the first: %s",
            len(kept),
            scheme,
            kept[0],
        )
    return planned


def _plan_router(
    skeleton: ModelSkeleton,
    scheme: str,
    shapes: Mapping[str, tuple[int, ...]],
    unquantizable: Collection[str],
) -> dict[str, TensorQuantization]:
    n_experts = max(experts.num_experts for experts in skeleton.experts_modules)
    head = skeleton.model.get_output_embeddings()
    planned: dict[str, TensorQuantization] = {}
    for module_name, module in skeleton.model.named_modules():
        name = f"{module_name}.weight"
        if name not in shapes or name in unquantizable:
            continue
        if not _is_dense_layer(module_name, module, n_experts):
            continue
        if module.weight.dtype is not skeleton.dtype:  # kept in float32 by the family
            continue
        module_scheme = "int8" if module is head else scheme
        chosen = choose_quantization(module_scheme, shapes[name], transposed=False)
        if chosen is not None:
            planned[name] = chosen
    return planned


def _is_dense_layer(name: str, module: nn.Module, n_experts: int) -> bool:
    """Return whether a module is a linear layer and no gate, by its name or its few outputs."""
    if type(module) is not nn.Linear or _GATE_NAME.search(name.rpartition(".")[2]):
        return False
    return module.out_features > n_experts
