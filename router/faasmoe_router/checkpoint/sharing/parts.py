"""What stores can share, and where its bytes lie: experts, and tensors of the router."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from faasmoe_contracts.store import LayerEntry, MappedLayer, Store, TensorView
from faasmoe_contracts.store.quantization import SCALE_SUFFIX
from faasmoe_contracts.store.tensors import TensorPiece, map_tensors


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive bytes of a file."""

    path: Path
    offset: int
    size_bytes: int

    def split(self, count: int) -> tuple[Span, ...]:
        """Return it as `count` spans of equal size."""
        size_bytes = self.size_bytes // count
        return tuple(
            Span(self.path, self.offset + i * size_bytes, size_bytes) for i in range(count)
        )


Spans = tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """What is shared as a whole: an expert, a layer's other parameters, or a router's tensor.

    Attributes:
        key: equal for parts that may be equal.
        digest: digest of the bytes; empty if it is not known.
        tensors: where each tensor's bytes lie, by the tensor's name.
    """

    key: Hashable
    digest: str
    tensors: Mapping[str, Spans]

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(span.size_bytes for span in self.spans)

    @property
    def spans(self) -> Spans:
        """All spans, tensor by tensor in name order."""
        return tuple(span for _, spans in sorted(self.tensors.items()) for span in spans)

    def laid_out_as(self, other: Part) -> Part | None:
        """Return this part in spans of the other's sizes; None if its bytes lie otherwise."""
        tensors: dict[str, Spans] = {}
        for name, spans in self.tensors.items():
            expected = other.tensors[name]
            found = spans[0].split(len(expected)) if len(spans) == 1 else spans
            if [s.size_bytes for s in found] != [s.size_bytes for s in expected]:
                return None
            tensors[name] = found
        return Part(self.key, self.digest, tensors)


def layer_parts(layer: LayerEntry, mapped: MappedLayer) -> list[Part]:
    """Return the parts of a layer: each expert, then the parameters that are not stacked."""
    blocks = range(layer.num_experts + 1)
    return [_layer_part(layer, mapped, block) for block in blocks]


def _layer_part(layer: LayerEntry, mapped: MappedLayer, block: int) -> Part:
    is_expert = block < layer.num_experts
    views = {
        name: view
        for name, view in mapped.tensors.items()
        if view.is_stacked(layer.num_experts) == is_expert
    }
    tensors = {
        name: _spans(view.expert_pieces(block) if is_expert else view.pieces, mapped)
        for name, view in views.items()
    }
    shapes = {name: view.shape[1:] if is_expert else view.shape for name, view in views.items()}
    form = tuple((name, views[name].dtype, shapes[name]) for name in sorted(views))
    digest = layer.digests[block]
    return Part((digest, form), digest, tensors)


def router_parts(store: Store) -> Iterator[tuple[str, TensorView, Part]]:
    """Yield the name, view and part of each tensor of a store's router.

    Without those of quantised modules, which a router reads from its own files.
    """
    checkpoint = store.manifest.checkpoint
    digests = {name: r.digest for name, r in checkpoint.router.items()} if checkpoint else {}
    mapped = [store.map_router_references(), *map(map_tensors, store.router_files())]
    codes = {f"{module}.weight" for module in store.manifest.router.quantized}
    for layer in mapped:
        for name, view in layer.tensors.items():
            if name in codes or name.removesuffix(SCALE_SUFFIX) in codes or not view.nbytes:
                continue
            spans = {name: _spans(view.pieces, layer)}
            yield name, view, Part((name, view.dtype, view.shape), digests.get(name, ""), spans)


def _spans(pieces: Sequence[TensorPiece], mapped: MappedLayer) -> Spans:
    return tuple(
        Span(mapped.files[piece.file].path, piece.offset, piece.buffer.nbytes) for piece in pieces
    )
