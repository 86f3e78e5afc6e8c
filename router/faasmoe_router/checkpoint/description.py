"""The manifest's words about a model and its MoE layers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from faasmoe_expert.functions.verification import layer_digests
from faasmoe_expert.store import LayerEntry, ModelEntry
from faasmoe_expert.store.tensors import map_tensors
from faasmoe_router.checkpoint.agreement import agreeing_kernel
from faasmoe_router.checkpoint.architecture import ExpertsModule, Skeleton
from faasmoe_router.checkpoint.blueprint import Blueprint
from faasmoe_router.checkpoint.errors import SourceUnsupported
from faasmoe_router.checkpoint.layout import FileLayout
from faasmoe_router.checkpoint.source import Source

_LENGTHS = ("max_position_embeddings", "model_max_length", "max_sequence_length", "n_positions")


def describe_model(skeleton: Skeleton, checkpoint: Source) -> ModelEntry:
    """Return the manifest's entry of the model."""
    text = skeleton.config.get_text_config()
    return ModelEntry(
        source=checkpoint.name,
        revision=checkpoint.revision,
        family=skeleton.config.model_type,
        architecture=type(skeleton.model).__name__,
        dtype=skeleton.dtype_name,
        hidden_size=_size(text, "hidden_size"),
        vocab_size=_size(text, "vocab_size"),
        max_position_embeddings=_size(text, *_LENGTHS),
        num_hidden_layers=_size(text, "num_hidden_layers"),
    )


def describe_layers(skeleton: Skeleton, blueprint: Blueprint) -> tuple[LayerEntry, ...]:
    """Return the manifest's entries of the experts modules, each with the kernel that agrees."""
    layouts = {layout.name: layout for layout in blueprint.layouts}
    return tuple(
        _describe_layer(experts, layouts[blueprint.experts_files[experts.name]])
        for experts in skeleton.experts
    )


def with_digests(folder: Path, layers: Iterable[LayerEntry]) -> tuple[LayerEntry, ...]:
    """Return the entries with the digests of what their files hold, blocks as they are read."""
    return tuple(
        replace(layer, digests=layer_digests(map_tensors(folder / layer.file), layer.num_experts))
        for layer in layers
    )


def _describe_layer(experts: ExpertsModule, layout: FileLayout) -> LayerEntry:
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
        kernel=agreeing_kernel(experts),
        expert_bytes=stacked_bytes // experts.num_experts,
        shared_bytes=total_bytes - stacked_bytes,
    )


def _size(config: Any, *names: str) -> int:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    raise SourceUnsupported(f"config: got none of {', '.join(names)}, expected an integer")
