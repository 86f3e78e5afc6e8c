"""Requests for the same experts, computed as one, and each one's part of what comes out. Pure.

Which kernel computes a layer's experts, and on what: the store's map, or a copy on a device.

An attached expert function: the experts of one block, over one or several layers.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_contracts.store import MappedLayer, Store
from faasmoe_contracts.store.manifest import LayerEntry
from faasmoe_contracts.text import short_repr
from faasmoe_contracts.wire import Dtype, ExpertRequest, FrameHeader, FrameKind, OutputMode
from faasmoe_expert.errors import BadAttachment, BadFrame
from faasmoe_expert.functions.grouped_kernel import GroupedKernel, supports_grouped_mm
from faasmoe_expert.functions.kernels import KernelSpec, RoutedPairs, gated_per_pair, gated_reduced
from faasmoe_expert.functions.transfer import Uploader, to_device, to_host
from faasmoe_expert.functions.transformers_kernel import TransformersKernel
from faasmoe_expert.functions.verification import BlockVerifier
from faasmoe_expert.functions.weights import LayerWeights, copy_weights, map_weights


def request_batch_key(request: ExpertRequest) -> Hashable:
    """Return what requests of one function must have in common to be computed as one."""
    header = request.header
    return header.layer, header.dtype, header.mode, header.hidden_size


def concat_requests(requests: Sequence[ExpertRequest]) -> ExpertRequest:
    """Return one request with the rows of all, in order; they must be alike, see `likeness`."""
    if len(requests) == 1:
        return requests[0]
    first = requests[0].header
    header = FrameHeader(
        FrameKind.REQUEST,
        first.dtype,
        first.mode,
        first.layer,
        sum(r.header.n_rows for r in requests),
        sum(r.header.n_pairs for r in requests),
        first.hidden_size,
    )
    row_offsets = np.cumsum([0, *(r.header.n_rows for r in requests[:-1])], dtype=np.int32)
    return ExpertRequest(
        header,
        np.concatenate([r.pair_row + n for r, n in zip(requests, row_offsets, strict=True)]),
        np.concatenate([r.pair_expert for r in requests]),
        np.concatenate([r.pair_weight for r in requests]),
        memoryview(bytearray().join(r.rows for r in requests)),
    )


def split_output(output: Tensor, requests: Sequence[ExpertRequest]) -> Iterator[Tensor]:
    """Give each request's part of the output of `joined`.

    Args:
        output: [T, H] in reduced mode, [P, H] in unreduced mode, over all requests.
        requests: as they were joined.
    """
    start = 0
    for request in requests:
        header = request.header
        end = start + (header.n_pairs if header.mode is OutputMode.UNREDUCED else header.n_rows)
        yield output[start:end]  # [t, H] or [p, H]
        start = end


class ExpertKernel(Protocol):
    """What computes one layer's pairs: from the host's memory to the host's memory."""

    def compute_per_pair(self, hidden: Tensor, pairs: RoutedPairs) -> Tensor:
        """Return each pair's weighted output [P, H]."""

    def compute_reduced(self, hidden: Tensor, pairs: RoutedPairs) -> Tensor:
        """Return the weighted sum of each row's experts [T, H]."""


class GatedKernel:
    """The lean kernel over one layer's mapped weights."""

    def __init__(self, spec: KernelSpec, weights: LayerWeights) -> None:
        self._spec = spec
        self._weights = weights.stacked

    def compute_per_pair(self, hidden: Tensor, pairs: RoutedPairs) -> Tensor:
        """Return each pair's weighted output [P, H]."""
        return gated_per_pair(self._spec, self._weights, hidden, pairs)

    def compute_reduced(self, hidden: Tensor, pairs: RoutedPairs) -> Tensor:
        """Return the weighted sum of each row's experts [T, H]."""
        return gated_reduced(self._spec, self._weights, hidden, pairs)


class DeviceKernel:
    """A kernel whose weights, and so its rows, are on a device."""

    def __init__(self, kernel: ExpertKernel, device: torch.device) -> None:
        self._kernel = kernel
        self._device = device

    def compute_per_pair(self, hidden: Tensor, pairs: RoutedPairs) -> Tensor:
        """Return each pair's weighted output [P, H]."""
        return to_host(
            self._kernel.compute_per_pair(
                to_device(hidden, self._device), self._pairs_to_device(pairs)
            )
        )

    def compute_reduced(self, hidden: Tensor, pairs: RoutedPairs) -> Tensor:
        """Return the weighted sum of each row's experts [T, H]."""
        return to_host(
            self._kernel.compute_reduced(
                to_device(hidden, self._device), self._pairs_to_device(pairs)
            )
        )

    def _pairs_to_device(self, pairs: RoutedPairs) -> RoutedPairs:
        return RoutedPairs(pairs.row, pairs.expert, to_device(pairs.weight, self._device))


def select_kernel(
    store: Store,
    layer: LayerEntry,
    mapped: MappedLayer,
    experts: tuple[int, ...],
    uploader: Uploader | None,
) -> ExpertKernel:
    """Return what computes some experts of a layer; raises BadAttachment if nothing can.

    Args:
        store: where the layer lies.
        layer: its entry in the manifest.
        mapped: its bytes.
        experts: those that are computed, ascending.
        uploader: copies them to a device; None leaves them on the map.
    """
    n_experts = layer.num_experts
    try:
        if uploader is None:
            return _gated_or_transformers_kernel(
                store, layer, map_weights(mapped, n_experts=n_experts), experts
            )
        weights = copy_weights(mapped, n_experts=n_experts, experts=experts, uploader=uploader)
        device = uploader.device
        if layer.kernel is not None and supports_grouped_mm(weights, device):
            return GroupedKernel(KernelSpec.from_json(layer.kernel), weights, experts, device)
        return DeviceKernel(_gated_or_transformers_kernel(store, layer, weights, experts), device)
    except (AttributeError, ImportError, KeyError, OSError, TypeError, ValueError) as error:
        raise BadAttachment(
            f"store: layer {layer.index} of {store.manifest.model.architecture} cannot be "
            f"computed: {error}",
            field="store",
        ) from error


def _gated_or_transformers_kernel(
    store: Store, layer: LayerEntry, weights: LayerWeights, experts: tuple[int, ...]
) -> ExpertKernel:
    """Return the lean kernel if the layer has one, else its family's own module."""
    if layer.kernel is not None:
        return GatedKernel(KernelSpec.from_json(layer.kernel), weights)
    architecture = store.manifest.model.architecture
    return TransformersKernel.from_store(
        store.path / "model", architecture, layer.name, weights, experts
    )


WIRE_TO_TORCH_DTYPE = {
    Dtype.BFLOAT16: torch.bfloat16,
    Dtype.FLOAT16: torch.float16,
    Dtype.FLOAT32: torch.float32,
}


class ExpertFunction:
    """A function that is attached and can compute.

    Args:
        spec: its id, layers and experts.
        store: where it lies.
        uploader: copies its experts to a device; None computes over the store's map.

    Attributes:
        spec: its id, layers and experts.
        store_path: folder of the store that it was cut from.
        model_digest: the store's digest.
        size_bytes: bytes of its experts' parameters, in the store and on a device.
        n_frames: frames computed so far.
    """

    def __init__(
        self,
        spec: FunctionSpec,
        store: Store,
        *,
        uploader: Uploader | None = None,
    ) -> None:
        self.spec = spec
        self.store_path = store.path
        self.model_digest = store.manifest.digest
        self.n_frames = 0
        layers = _layer_entries(store, spec)
        self.size_bytes = function_size_bytes(spec, store)
        self._dtype = store.manifest.model.dtype
        self._hidden_size = {index: layer.hidden_size for index, layer in layers.items()}
        self._block_mask = _expert_mask(spec, layers)
        self._verifiers: dict[int, BlockVerifier] = {}
        self._kernels: dict[int, ExpertKernel] = {}
        for index, layer in layers.items():
            mapped = store.map_layer(index)
            mapped.prefault(layer.num_experts, spec.experts)
            verifier = BlockVerifier(store, layer, mapped, spec.experts)
            verifier.verify_if_changed()
            if uploader is None:  # what is copied needs no guard, nor the map
                self._verifiers[index] = verifier
            self._kernels[index] = select_kernel(store, layer, mapped, spec.experts, uploader)

    def compute(self, request: ExpertRequest) -> Tensor:
        """Return the outputs of a frame on the CPU, in the frame's dtype.

        Returns:
            [T, H] in reduced mode, [P, H] in unreduced mode, contiguous.

        Raises:
            BadFrame: the frame does not fit this function.
            Corrupted: the function's bytes in the store have changed, and are wrong now.
        """
        self.check_request(request)
        return self.compute_batch([request])[0]

    @torch.inference_mode()
    def compute_batch(self, requests: Sequence[ExpertRequest]) -> list[Tensor]:
        """Return what `compute` does for each of some requests, reading every weight once.

        Args:
            requests: alike (see joining.py) and checked.
        """
        request = concat_requests(requests)
        output = self._compute_request(request)
        # Asked afterwards, for the bytes that were read.
        while self._verifiers and self._verifiers[request.header.layer].verify_if_changed():
            output = self._compute_request(request)
        self.n_frames += len(requests)
        return list(split_output(output, requests))

    def _compute_request(self, request: ExpertRequest) -> Tensor:
        header = request.header
        dtype = WIRE_TO_TORCH_DTYPE[header.dtype]
        hidden = torch.frombuffer(request.rows, dtype=dtype).view(header.n_rows, -1)  # [T, H]
        weight = torch.from_numpy(request.pair_weight)  # [P]
        pairs = RoutedPairs(request.pair_row, request.pair_expert, weight)
        kernel = self._kernels[header.layer]
        compute = (
            kernel.compute_per_pair
            if header.mode is OutputMode.UNREDUCED
            else kernel.compute_reduced
        )
        return compute(hidden, pairs).contiguous()

    def check_request(self, request: ExpertRequest) -> None:
        """Compare a frame with this function; raises BadFrame if it does not fit."""
        header = request.header
        if header.layer not in self._kernels:
            raise _invalid_frame(
                "layer", got=header.layer, expected=f"one of {short_repr(list(self.spec.layers))}"
            )
        if header.dtype.name.lower() != self._dtype:
            raise _invalid_frame("dtype", got=header.dtype.name.lower(), expected=self._dtype)
        hidden_size = self._hidden_size[header.layer]
        if header.hidden_size != hidden_size:
            raise _invalid_frame("hidden_size", got=header.hidden_size, expected=hidden_size)
        block_mask = self._block_mask
        outside = request.pair_expert >= len(block_mask)
        if not outside.any():
            outside = ~block_mask[request.pair_expert]
        if outside.any():
            experts = f"experts of this block: {short_repr(list(self.spec.experts))}"
            raise _invalid_frame(
                "pair_expert", got=int(request.pair_expert[outside][0]), expected=experts
            )


def _invalid_frame(field: str, *, got: object, expected: object) -> BadFrame:
    return BadFrame(f"{field}: got {got}, expected {expected}", field=field)


def function_size_bytes(spec: FunctionSpec, store: Store) -> int:
    """Return the bytes of a function's parameters; raises BadAttachment if it has no such ones."""
    return sum(
        layer.expert_bytes * len(spec.experts) + layer.shared_bytes
        for layer in _layer_entries(store, spec).values()
    )


def _layer_entries(store: Store, spec: FunctionSpec) -> dict[int, LayerEntry]:
    return {index: _layer_entry(store, index, spec) for index in spec.layers}


def _layer_entry(store: Store, index: int, spec: FunctionSpec) -> LayerEntry:
    layers = store.manifest.layers
    if index >= len(layers):
        raise BadAttachment(
            f"layers: got {index}, expected indices below {len(layers)}", field="layers"
        )
    layer = layers[index]
    if spec.experts[-1] >= layer.num_experts:
        raise BadAttachment(
            f"experts: got {spec.experts[-1]}, expected indices below {layer.num_experts}",
            field="experts",
        )
    return layer


def _expert_mask(spec: FunctionSpec, layers: dict[int, LayerEntry]) -> NDArray[np.bool_]:
    mask = np.zeros(max(layer.num_experts for layer in layers.values()), dtype=np.bool_)
    mask[list(spec.experts)] = True
    return mask
