"""Makes a store share what other stores hold already.

Runs before the manifest is written: parts that are equal to another store's become references to
hard links of its files, and files of the store's own are rewritten without them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from faasmoe_contracts.store import FileEntry, LayerEntry, Manifest, MappedLayer, Store
from faasmoe_contracts.store.digests import page_sum_digest
from faasmoe_contracts.store.referenced_files import CheckpointFile, FilePlace
from faasmoe_contracts.store.references import CheckpointEntry, RouterReference, TensorReference
from faasmoe_contracts.store.tensors import DTYPE_SIZES, TensorView, map_tensors
from faasmoe_router.checkpoint.progress import Progress
from faasmoe_router.checkpoint.reference_plan import join_pieces
from faasmoe_router.checkpoint.sharing.equality import FileIds, find_equal
from faasmoe_router.checkpoint.sharing.links import SharedLinks
from faasmoe_router.checkpoint.sharing.parts import Part, layer_parts, router_parts
from faasmoe_router.checkpoint.sharing.remainder import (
    write_layer_remainder,
    write_router_remainder,
)
from faasmoe_router.checkpoint.sharing.stores import parts_by_key

Pieces = tuple[tuple[int, int], ...]


@dataclass(slots=True)
class _Result:
    """The parts of a manifest while they change.

    Attributes:
        folder: the store's folder.
        links: makes links of shared files.
        files: all files that references may point to; those of the checkpoint first.
        layers: references by the layer's index.
        router: references of the router's tensors.
        stored: the store's own files.
        unfiled: layers whose parameters lie in no file of their own any more.
    """

    folder: Path
    links: SharedLinks
    files: list[CheckpointFile]
    layers: dict[int, Mapping[str, TensorReference]]
    router: dict[str, RouterReference]
    stored: dict[str, FileEntry]
    unfiled: set[int] = field(default_factory=set)

    def shared_pieces(self, part: Part) -> dict[str, Pieces] | None:
        """Return a shared part's pieces by the tensor's name; None if they cannot be linked."""
        pieces: dict[str, Pieces] = {}
        for name, spans in part.tensors.items():
            links = [self.links.link(span.path) for span in spans]
            found = [
                (self.index_of(link), span.offset)
                for link, span in zip(links, spans, strict=True)
                if link is not None
            ]
            if len(found) < len(spans):
                return None
            pieces[name] = tuple(found)
        return pieces

    def index_of(self, file: CheckpointFile) -> int:
        """Return the index of a file, which is added if it is new."""
        if file not in self.files:
            self.files.append(file)
        return self.files.index(file)

    def replace_stored(self, name: str, entry: FileEntry | None) -> None:
        """Take the entry of a rewritten file, or its removal."""
        del self.stored[name]
        if entry is not None:
            self.stored[name] = entry


def share_equal_parts(
    folder: Path, manifest: Manifest, stores: Sequence[Store], progress: Progress
) -> Manifest:
    """Share what other stores hold already.

    Args:
        folder: the store's folder, with its files and without a manifest.
        manifest: what its manifest would be.
        stores: the other stores.
        progress: receives the bytes that were compared.

    Returns:
        The manifest to write; the given one if nothing is shared.

    Raises:
        StoreError: a file cannot be read.
    """
    store, ids = Store(folder, manifest), FileIds()
    links = SharedLinks(folder, ids)
    others = parts_by_key(stores)
    if not others:
        return manifest
    mapped = {layer.index: store.map_layer(layer.index) for layer in manifest.layers}
    parts = {i: layer_parts(manifest.layers[i], layer) for i, layer in mapped.items()}
    router = list(router_parts(store))
    own = [part for layer in parts.values() for part in layer] + [part for _, _, part in router]
    progress.start("comparing with other stores", total_bytes=sum(p.size_bytes for p in own))
    equal = find_equal(own, others, progress.advance, ids)
    if not equal:
        return manifest
    entry = manifest.checkpoint
    result = _Result(
        folder,
        links,
        list(entry.files) if entry else [],
        dict(entry.layers) if entry else {},
        dict(entry.router) if entry else {},
        dict(manifest.files),
    )
    start = 0
    for index, layer in mapped.items():
        blocks = range(len(parts[index]))
        found = {block: equal[start + block] for block in blocks if start + block in equal}
        _share_layer(result, manifest.layers[index], layer, found, store)
        start += len(blocks)
    shared = {name: equal[start + i] for i, (name, _, _) in enumerate(router) if start + i in equal}
    _share_router(result, {name: view for name, view, _ in router}, shared)
    shared_manifest = _with_result(manifest, result)
    entry = shared_manifest.checkpoint
    used = [f for f in entry.files if f.place is FilePlace.SHARED] if entry else []
    links.keep(used)
    return shared_manifest if used else manifest


def _share_layer(
    result: _Result, layer: LayerEntry, mapped: MappedLayer, found: Mapping[int, Part], store: Store
) -> None:
    """Refer to the found blocks of a layer, and to its others where they are."""
    linked = {block: result.shared_pieces(part) for block, part in found.items()}
    shared = {block: pieces for block, pieces in linked.items() if pieces is not None}
    is_tied = sum(other.file == layer.file for other in store.manifest.layers) > 1
    if not shared or (layer.file and is_tied) or _has_empty_tensor(mapped):
        return
    if layer.kernel is None and not _is_plain(layer, mapped, shared):
        return  # only the family's own module computes it, which reads stacked tensors
    if layer.file:
        own = _write_remainder(result, layer, mapped, shared)
    else:
        own = _own_pieces(layer, mapped, store)
    result.layers[layer.index] = {
        name: _reference(name, view, layer, {**own, **shared})
        for name, view in mapped.tensors.items()
    }


def _reference(
    name: str, view: TensorView, layer: LayerEntry, blocks: Mapping[int, Mapping[str, Pieces]]
) -> TensorReference:
    """Return a tensor's reference, of the pieces of each block."""
    if not view.is_stacked(layer.num_experts):
        return TensorReference(view.dtype, view.shape, blocks[layer.num_experts][name])
    pieces = [piece for expert in range(layer.num_experts) for piece in blocks[expert][name]]
    return join_pieces(TensorReference(view.dtype, view.shape, tuple(pieces)), layer.num_experts)


def _has_empty_tensor(mapped: MappedLayer) -> bool:
    return any(view.nbytes == 0 for view in mapped.tensors.values())


def _is_plain(
    layer: LayerEntry, mapped: MappedLayer, shared: Mapping[int, Mapping[str, Pieces]]
) -> bool:
    """Return whether a layer would be stacked tensors, aligned to their dtypes."""
    blocks = {layer.num_experts} if layer.shared_bytes else set()
    if {*range(layer.num_experts), *blocks} != set(shared):
        return False
    references = [_reference(name, view, layer, shared) for name, view in mapped.tensors.items()]
    return all(
        len(reference.pieces) == 1 and reference.pieces[0][1] % DTYPE_SIZES[reference.dtype] == 0
        for reference in references
    )


def _write_remainder(
    result: _Result, layer: LayerEntry, mapped: MappedLayer, shared: Mapping[int, object]
) -> dict[int, dict[str, Pieces]]:
    """Rewrite a layer's file without what is shared; return the pieces of the other blocks."""
    kept = [block for block in range(layer.num_experts + 1) if block not in shared]
    entry, offsets = write_layer_remainder(result.folder, layer, mapped, kept)
    result.replace_stored(layer.file, entry)
    result.unfiled.add(layer.index)
    if entry is None:
        return {}
    file = CheckpointFile(layer.file, entry.size_bytes, FilePlace.STORE)
    index = result.index_of(file)
    own: dict[int, dict[str, Pieces]] = {}
    for (name, block), offset in offsets.items():
        own.setdefault(block, {})[name] = ((index, offset),)
    return own


def _own_pieces(
    layer: LayerEntry, mapped: MappedLayer, store: Store
) -> dict[int, dict[str, Pieces]]:
    """Return the pieces of each block of a layer that lies in the checkpoint."""
    checkpoint = store.manifest.checkpoint
    assert checkpoint is not None  # a layer without a file is referred to
    index_of = {checkpoint.path_of(store.path, i): i for i in range(len(checkpoint.files))}
    return {
        block: {
            name: tuple((index_of[span.path], span.offset) for span in spans)
            for name, spans in part.tensors.items()
        }
        for block, part in enumerate(layer_parts(layer, mapped))
    }


def _share_router(
    result: _Result, views: Mapping[str, TensorView], found: Mapping[str, Part]
) -> None:
    """Refer to the found tensors of the router, and rewrite its files without them."""
    shared: set[str] = set()
    for name, part in found.items():
        pieces = result.shared_pieces(part)
        if pieces is None:
            continue
        view = views[name]
        digest = page_sum_digest([view.buffer])
        tensor = TensorReference(view.dtype, view.shape, pieces[name])
        result.router[name] = RouterReference(tensor, digest)
        shared.add(name)
    for name in [name for name in result.stored if name.startswith("router/")]:
        if not shared.isdisjoint(map_tensors(result.folder / name).tensors):
            result.replace_stored(name, write_router_remainder(result.folder, name, shared))


def _with_result(manifest: Manifest, result: _Result) -> Manifest:
    """Return the manifest with the changed references, and the files that they use."""
    tensors = [tensor for layer in result.layers.values() for tensor in layer.values()]
    tensors += [reference.tensor for reference in result.router.values()]
    used = sorted({file for tensor in tensors for file, _ in tensor.pieces})
    position = {file: index for index, file in enumerate(used)}

    def renumbered(tensor: TensorReference) -> TensorReference:
        pieces = tuple((position[file], offset) for file, offset in tensor.pieces)
        return replace(tensor, pieces=pieces)

    old = manifest.checkpoint
    entry = CheckpointEntry(
        old.root if old else "",
        tuple(result.files[file] for file in used),
        {
            index: {name: renumbered(tensor) for name, tensor in layer.items()}
            for index, layer in result.layers.items()
        },
        {name: replace(r, tensor=renumbered(r.tensor)) for name, r in result.router.items()},
        old.copied if old else {},
    )
    layers = tuple(
        replace(layer, file="") if layer.index in result.unfiled else layer
        for layer in manifest.layers
    )
    return Manifest.create(
        model=manifest.model,
        layers=layers,
        files=result.stored,
        quantization=manifest.quantization,
        router=manifest.router,
        checkpoint=entry,
        published=manifest.published,
    )
