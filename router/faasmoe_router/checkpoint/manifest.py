"""The manifest's entries for a model and its MoE layers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from faasmoe_contracts.store import LayerEntry, ModelEntry, RouterEntry, TensorQuantization
from faasmoe_contracts.store.digests import layer_digests
from faasmoe_contracts.store.references import (
    CheckpointEntry,
    RouterReference,
    TensorReference,
    checkpoint_root,
)
from faasmoe_contracts.store.tensors import map_tensors
from faasmoe_router.checkpoint.kernel_selection import select_kernel
from faasmoe_router.checkpoint.reference_digests import (
    CheckpointReader,
    DigestRecord,
    layer_blocks,
    router_block,
)
from faasmoe_router.checkpoint.reference_plan import CheckpointLayout, ReferencePlan
from faasmoe_router.checkpoint.source import CheckpointSource
from faasmoe_router.checkpoint.store_plan import FileLayout, StorePlan, TensorSpec
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
    entries = []
    for experts in skeleton.experts_modules:
        file = plan.file_by_experts_module[experts.name]
        if file:
            entries.append(_layer_entry(experts, layouts[file], quantized))
        else:
            references = plan.references.layers[experts.name]
            entries.append(_referenced_layer_entry(experts, references, quantized))
    return tuple(entries)


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
    Layers without a file have their digests already.
    """
    return tuple(
        replace(layer, digests=layer_digests(map_tensors(folder / layer.file), layer.num_experts))
        if layer.file
        else layer
        for layer in layers
    )


def with_references(
    folder: Path,
    layers: tuple[LayerEntry, ...],
    plan: ReferencePlan,
    layout: CheckpointLayout,
    on_bytes_read: Callable[[int], None],
    *,
    allows_nonfinite: bool,
    record: DigestRecord,
) -> tuple[tuple[LayerEntry, ...], CheckpointEntry]:
    """Read what the store refers to; return layers with digests and the checkpoint's entry.

    Args:
        folder: the store's folder.
        layers: entries of all layers.
        plan: what the store refers to.
        layout: the checkpoint's files.
        on_bytes_read: called with the bytes of each read, by several threads.
        allows_nonfinite: whether weights may be NaN or infinite.
        record: the digests that are known already, and those that are computed.

    Raises:
        StoreError: a file of the checkpoint cannot be read or changes meanwhile.
        WeightsNotFinite: weights are NaN or infinite.
    """
    plan, files = plan.with_used_files(layout.files)
    by_index = {x.index: plan.layers[x.name] for x in layers if x.name in plan.layers}
    blocks = {index: list(layer_blocks(layers[index], t)) for index, t in by_index.items()}
    router = [router_block(name, tensor) for name, tensor in plan.router.items()]
    paths = [layout.root / file.name for file in files]
    with CheckpointReader(paths, on_bytes_read) as reader:
        every_block = [block for layer in blocks.values() for block in layer]
        found = reader.digests(
            [*every_block, *router], is_finite=not allows_nonfinite, record=record
        )
        digests = iter(found)
    layers = tuple(
        replace(layer, digests=tuple(islice(digests, len(blocks[layer.index]))))
        if layer.index in blocks
        else layer
        for layer in layers
    )
    references = {
        name: RouterReference(tensor, next(digests)) for name, tensor in plan.router.items()
    }
    copied: dict[str, list[str]] = {}
    for name, reason in plan.copied.items():
        copied.setdefault(reason, []).append(name)
    root = checkpoint_root(layout.root, Path(os.path.realpath(folder)))
    entry = CheckpointEntry(
        root,
        files,
        by_index,
        references,
        {reason: tuple(sorted(names)) for reason, names in copied.items()},
    )
    return layers, entry


def _layer_entry(
    experts: ExpertsModule, layout: FileLayout, quantized: Mapping[str, TensorQuantization]
) -> LayerEntry:
    entries = {t.local_name: quantized[t.name] for t in layout.tensors if t.name in quantized}
    return replace(
        _entry_of_tensors(experts, layout.tensors), file=layout.name, quantization=entries
    )


def _referenced_layer_entry(
    experts: ExpertsModule,
    references: Mapping[str, TensorReference],
    quantized: Mapping[str, TensorQuantization],
) -> LayerEntry:
    entries = {
        local: quantized[name]
        for local in references
        if (name := f"{experts.name}.{local}") in quantized
    }
    return replace(_entry_of_tensors(experts, references.values()), quantization=entries)


def _entry_of_tensors(
    experts: ExpertsModule, tensors: Iterable[TensorSpec | TensorReference]
) -> LayerEntry:
    """Return the entry of a layer with these tensors, without a file."""
    tensors = list(tensors)
    stacked_bytes = sum(t.size_bytes for t in tensors if t.shape[:1] == (experts.num_experts,))
    return LayerEntry(
        index=experts.index,
        name=experts.name,
        file="",
        num_experts=experts.num_experts,
        top_k=experts.top_k,
        hidden_size=experts.hidden_size,
        class_name=experts.class_name,
        kernel=select_kernel(experts),
        expert_bytes=stacked_bytes // experts.num_experts,
        shared_bytes=sum(t.size_bytes for t in tensors) - stacked_bytes,
    )


def _positive_int(config: Any, *names: str) -> int:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    raise SourceUnsupported(f"config: got none of {', '.join(names)}, expected a positive integer")
