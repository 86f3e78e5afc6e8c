"""The manifest's entries for a model and its MoE layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from faasmoe_contracts.store import LayerEntry, ModelEntry, RouterEntry, TensorQuantization
from faasmoe_contracts.store.digests import layer_digests
from faasmoe_contracts.store.tensors import map_tensors
from faasmoe_router.checkpoint.kernel_selection import select_kernel
from faasmoe_router.checkpoint.source import CheckpointSource
from faasmoe_router.checkpoint.store_plan import FileLayout, StorePlan
from faasmoe_router.errors import SourceUnsupported
from faasmoe_transformers.model_skeleton import ExpertsModule, ModelSkeleton

_CONTEXT_LENGTH_FIELDS = (
    "max_position_embeddings",
    "model_max_length",
    "max_sequence_length",
    "n_positions",
)


def model_entry(skeleton: ModelSkeleton, checkpoint: CheckpointSource) -> ModelEntry:
    """Return the manifest's entry for the model.

    Raises:
        SourceUnsupported: the config lacks one of the sizes.
    """
    text_config = skeleton.config.get_text_config()
    return ModelEntry(
        source=checkpoint.name,
        revision=checkpoint.revision,
        family=skeleton.config.model_type,
        architecture=type(skeleton.model).__name__,
        dtype=skeleton.dtype_name,
        hidden_size=_positive_int(text_config, "hidden_size"),
        vocab_size=_positive_int(text_config, "vocab_size"),
        max_position_embeddings=_positive_int(text_config, *_CONTEXT_LENGTH_FIELDS),
        num_hidden_layers=_positive_int(text_config, "num_hidden_layers"),
    )


def layer_entries(
    skeleton: ModelSkeleton, plan: StorePlan, quantized: Mapping[str, TensorQuantization]
) -> tuple[LayerEntry, ...]:
    """Return the manifest's entries for the experts modules, each with its equivalent kernel.

    Args:
        skeleton: the model.
        plan: the plan of the store.
        quantized: how each quantised parameter is stored, by its name in the model.
    """
    layouts = {layout.name: layout for layout in plan.layouts}
    return tuple(
        _layer_entry(experts, layouts[plan.file_by_experts_module[experts.name]], quantized)
        for experts in skeleton.experts_modules
    )


def router_entry(
    layers: Iterable[LayerEntry], quantized: Mapping[str, TensorQuantization]
) -> RouterEntry:
    """Return the entry of the router: the quantised modules that are no experts."""
    experts = tuple(f"{layer.name}." for layer in layers)
    return RouterEntry(
        {
            name.removesuffix(".weight"): entry
            for name, entry in quantized.items()
            if not name.startswith(experts)
        }
    )


def with_layer_digests(folder: Path, layers: Iterable[LayerEntry]) -> tuple[LayerEntry, ...]:
    """Return the entries with digests of the tensors in their files.

    A layer has one digest per block that a sandbox reads: each expert, then the shared parameters.
    """
    return tuple(
        replace(layer, digests=layer_digests(map_tensors(folder / layer.file), layer.num_experts))
        for layer in layers
    )


def _layer_entry(
    experts: ExpertsModule, layout: FileLayout, quantized: Mapping[str, TensorQuantization]
) -> LayerEntry:
    stacked_bytes = sum(
        t.size_bytes for t in layout.tensors if t.shape[:1] == (experts.num_experts,)
    )
    total_bytes = sum(t.size_bytes for t in layout.tensors)
    return LayerEntry(
        index=experts.index,
        name=experts.name,
        file=layout.name,
        num_experts=experts.num_experts,
        top_k=experts.top_k,
        hidden_size=experts.hidden_size,
        class_name=experts.class_name,
        kernel=select_kernel(experts),
        expert_bytes=stacked_bytes // experts.num_experts,
        shared_bytes=total_bytes - stacked_bytes,
        quantization={
            tensor.local_name: quantized[tensor.name]
            for tensor in layout.tensors
            if tensor.name in quantized
        },
    )


def _positive_int(config: Any, *names: str) -> int:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    raise SourceUnsupported(f"config: got none of {', '.join(names)}, expected a positive integer")
