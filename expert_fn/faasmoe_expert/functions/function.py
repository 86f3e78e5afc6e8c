"""An attached expert function: computes the experts of one block in one or several layers.

Selects a kernel for each layer, on the mapped store or on a copy of the block on a device. Batches
requests for the same layer, and verifies the mapped bytes after each computation. Knows nothing of
HTTP; requests are decoded wire frames.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
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
from faasmoe_expert.functions.kernels import (
    KernelSpec,
    RoutedPairs,
    StackedParameter,
    gated_per_pair,
    gated_reduced,
)
from faasmoe_expert.functions.native_kernel import NativeKernel, NativeLayer, UnsupportedLayer
from faasmoe_expert.functions.stacks import Float32Stack
from faasmoe_expert.functions.transfer import Uploader, to_device, to_host
from faasmoe_expert.functions.transformers_kernel import (
    QuantizedTransformersKernel,
    TransformersKernel,
)
from faasmoe_expert.functions.verification import BlockVerifier
from faasmoe_expert.functions.weights import LayerWeights, copy_weights, map_weights
from faasmoe_kernels import KernelsUnavailable, load
from faasmoe_transformers.errors import UnsupportedModel, UnsupportedVersions
from faasmoe_transformers.meta_model import copy_experts_module

WIRE_TO_TORCH_DTYPE = {
    Dtype.BFLOAT16: torch.bfloat16,
    Dtype.FLOAT16: torch.float16,
    Dtype.FLOAT32: torch.float32,
}


class ExpertFunction:
    """A function that is attached and ready to compute.

    Args:
        spec: id, layers and experts of the function.
        store: the store to read it from.
        uploader: copies its experts to a device; None computes on the mapped store.
        until_s: until when (monotonic clock) to verify bytes of the store.

    Attributes:
        spec: id, layers and experts of the function.
        store_path: directory of the store.
        model_digest: digest of the store's manifest.
        size_bytes: bytes of its parameters: in the store, or dequantised on a device.
        n_frames: number of frames computed so far.

    Raises:
        BadAttachment: the store has no such layers or experts, or they cannot be computed.
        BlockCorrupted: bytes of the store do not match their digest.
        StoreError: a file of the store is missing or invalid.
        OutOfTime: not all bytes were verified in time; those that were will not be again.
    """

    def __init__(
        self,
        spec: FunctionSpec,
        store: Store,
        *,
        uploader: Uploader | None = None,
        until_s: float = math.inf,
    ) -> None:
        self.spec = spec
        self.store_path = store.path
        self.model_digest = store.manifest.digest
        self.n_frames = 0
        layers = _layer_entries(store, spec)
        self.size_bytes = function_size_bytes(spec, store, is_dequantized=uploader is not None)
        self._dtype = store.manifest.model.dtype
        self._layers = layers
        self._hidden_size = {index: layer.hidden_size for index, layer in layers.items()}
        self._block_mask = _expert_mask(spec, layers)
        self._verifiers: dict[int, BlockVerifier] = {}
        self._kernels: dict[int, ExpertKernel] = {}
        for index, layer in layers.items():
            mapped = store.map_layer(index)
            verifier = BlockVerifier(store, layer, mapped, spec.experts)
            verifier.verify_if_changed(until_s=until_s)
            if uploader is None:  # a copy is independent of the file
                self._verifiers[index] = verifier
            self._kernels[index] = select_kernel(store, layer, mapped, spec.experts, uploader)

    @property
    def kernel_name(self) -> str:
        """What computes the function's layers, such as "native (avx2)"; see ExpertKernel."""
        return ", ".join(sorted({kernel.name for kernel in self._kernels.values()}))

    @property
    def native_layers(self) -> tuple[NativeLayer, ...]:
        """The layers that the kernel library can compute without Python, as verified now."""
        layers = []
        for index, kernel in self._kernels.items():
            verifier = self._verifiers.get(index)
            if isinstance(kernel, NativeKernel) and verifier is not None and verifier.files:
                dtype = getattr(torch, self._dtype)
                layers.append(kernel.native_layer(self._layers[index], dtype, verifier.files))
        return tuple(layers)

    def has_identities(self, layers: Sequence[NativeLayer]) -> bool:
        """Return whether these layers' files are still those that were verified last."""
        return all(self._verifiers[x.layer].files == x.files for x in layers)

    def compute(self, request: ExpertRequest) -> Tensor:
        """Compute one frame.

        Returns:
            Contiguous CPU tensor: float32 [T, H] in reduced mode, [P, H] in the frame's dtype in
            unreduced mode.

        Raises:
            BadFrame: the frame does not match this function.
            BlockCorrupted: the store was modified and no longer matches its digests.
        """
        self.check_request(request)
        return self.compute_batch([request])[0]

    @torch.inference_mode()
    def compute_batch(self, requests: Sequence[ExpertRequest]) -> list[Tensor]:
        """Compute several frames as one, reading each weight once.

        Args:
            requests: requests that passed `check_request` and have the same `request_batch_key`.

        Returns:
            The output of each request, see `compute`.

        Raises:
            BlockCorrupted: the store was modified and no longer matches its digests.
        """
        request = concat_requests(requests)
        output = self._compute_request(request)
        # Verified afterwards, so that the bytes that were read are covered.
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
        """Raise BadFrame if the layer, dtype, size or experts do not match this function."""
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
        outside = request.pair_expert >= len(block_mask)  # [P]
        if not outside.any():
            outside = ~block_mask[request.pair_expert]  # [P]
        if outside.any():
            experts = f"experts of this block: {short_repr(list(self.spec.experts))}"
            raise _invalid_frame(
                "pair_expert", got=int(request.pair_expert[outside][0]), expected=experts
            )


def _invalid_frame(field: str, *, got: object, expected: object) -> BadFrame:
    return BadFrame(f"{field}: got {got}, expected {expected}", field=field)


def function_size_bytes(spec: FunctionSpec, store: Store, *, is_dequantized: bool = False) -> int:
    """Return the size of a function's parameters.

    Args:
        spec: the function.
        store: its store.
        is_dequantized: whether quantised ones are held in the model's dtype, as on a device.

    Raises:
        BadAttachment: the store lacks some of them.
    """
    item_bytes = torch.finfo(getattr(torch, store.manifest.model.dtype)).bits // 8
    total = 0
    for layer in _layer_entries(store, spec).values():
        expert_bytes = layer.expert_bytes
        for entry in layer.quantization.values() if is_dequantized else ():
            expert_bytes += math.prod(entry.shape) * item_bytes - entry.size_bytes
        total += expert_bytes * len(spec.experts) + layer.shared_bytes
    return total


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


class ExpertKernel(Protocol):
    """Computes pairs of one layer; inputs and outputs are on the host.

    Attributes:
        name: what computes, such as "native (avx2)", for status and logs.
    """

    name: str

    def compute_per_pair(self, hidden: Tensor, pairs: RoutedPairs) -> Tensor:
        """Return the weighted output of each pair, [P, H]."""

    def compute_reduced(self, hidden: Tensor, pairs: RoutedPairs) -> Tensor:
        """Return the weighted sum over each row's experts, float32 [T, H]."""


def select_kernel(
    store: Store,
    layer: LayerEntry,
    mapped: MappedLayer,
    experts: tuple[int, ...],
    uploader: Uploader | None,
) -> ExpertKernel:
    """Return the kernel for some experts of a layer.

    Args:
        store: the store of the layer.
        layer: manifest entry of the layer.
        mapped: the mapped layer.
        experts: global expert indices, ascending.
        uploader: copies the experts to a device; None computes on the mapping.

    Raises:
        BadAttachment: the layer's module or parameters are unsupported.
    """
    n_experts = layer.num_experts
    try:
        if uploader is None:
            return _gated_or_transformers_kernel(
                store,
                layer,
                map_weights(mapped, n_experts=n_experts, quantization=layer.quantization),
                experts,
            )
        weights = copy_weights(
            mapped,
            n_experts=n_experts,
            experts=experts,
            uploader=uploader,
            quantization=layer.quantization,
            dtype=getattr(torch, store.manifest.model.dtype),
        )
        device = uploader.device
        if layer.kernel is not None and supports_grouped_mm(weights, device):
            return GroupedKernel(KernelSpec.from_json(layer.kernel), weights, experts, device)
        return DeviceKernel(_gated_or_transformers_kernel(store, layer, weights, experts), device)
    except (
        AttributeError,
        ImportError,
        KeyError,
        OSError,
        TypeError,
        UnsupportedModel,
        UnsupportedVersions,
        ValueError,
    ) as error:
        raise BadAttachment(
            f"store: layer {layer.index} of {store.manifest.model.architecture} cannot be "
            f"computed: {error}",
            field="store",
        ) from error


def _gated_or_transformers_kernel(
    store: Store, layer: LayerEntry, weights: LayerWeights, experts: tuple[int, ...]
) -> ExpertKernel:
    """Return the fastest kernel that supports the layer: native, gated, or the family's module."""
    if layer.kernel is not None:
        spec = KernelSpec.from_json(layer.kernel)
        try:
            # Codes are never left to torch where the library reads them.
            is_quantized = weights.is_quantized
            large = None if is_quantized else GatedKernel(spec, weights, reason="large batches")
            return NativeKernel(
                spec, weights, experts, load(), large_batch_kernel=large, layer=layer.index
            )
        except (KernelsUnavailable, UnsupportedLayer) as error:
            return GatedKernel(spec, weights, reason=str(error))
    architecture = store.manifest.model.architecture
    if weights.is_quantized:
        module = copy_experts_module(store.path / "model", architecture, layer.name)
        return QuantizedTransformersKernel(module, weights)
    return TransformersKernel.from_store(
        store.path / "model", architecture, layer.name, weights, experts
    )


class GatedKernel:
    """The gated kernel with one layer's weights.

    Codes and scales are dequantised expert by expert as they are used, and computed in float32,
    which is slow.

    Args:
        spec: form of the kernel.
        weights: the layer's expert parameters.
        reason: why the native kernel is not used instead.
    """

    def __init__(self, spec: KernelSpec, weights: LayerWeights, *, reason: str) -> None:
        self._spec = spec
        self._weights: Mapping[str, StackedParameter] = weights.stacked
        self._dtype: torch.dtype | None = None  # None: that of the input
        if weights.is_quantized:
            reason += ", dequantises on use"
            self._dtype = torch.float32
            self._weights = {name: _as_float32(stack) for name, stack in weights.stacked.items()}
        self.name = f"torch ({reason})"

    def compute_per_pair(self, hidden: Tensor, pairs: RoutedPairs) -> Tensor:
        """Return the weighted output of each pair, [P, H]."""
        output = gated_per_pair(self._spec, self._weights, self._cast(hidden), pairs)
        return output.to(hidden.dtype)

    def compute_reduced(self, hidden: Tensor, pairs: RoutedPairs) -> Tensor:
        """Return the weighted sum over each row's experts, float32 [T, H]."""
        return gated_reduced(self._spec, self._weights, self._cast(hidden), pairs)

    def _cast(self, hidden: Tensor) -> Tensor:
        return hidden if self._dtype is None else hidden.to(self._dtype)


def _as_float32(stack: StackedParameter) -> StackedParameter:
    return Float32Stack(stack) if isinstance(stack, Tensor) else stack


class DeviceKernel:
    """Adapts a kernel with weights on a device to inputs and outputs on the host."""

    def __init__(self, kernel: ExpertKernel, device: torch.device) -> None:
        self.name = kernel.name
        self._kernel = kernel
        self._device = device

    def compute_per_pair(self, hidden: Tensor, pairs: RoutedPairs) -> Tensor:
        """Return the weighted output of each pair, [P, H]."""
        return to_host(
            self._kernel.compute_per_pair(
                to_device(hidden, self._device), self._pairs_to_device(pairs)
            )
        )

    def compute_reduced(self, hidden: Tensor, pairs: RoutedPairs) -> Tensor:
        """Return the weighted sum over each row's experts, float32 [T, H]."""
        return to_host(
            self._kernel.compute_reduced(
                to_device(hidden, self._device), self._pairs_to_device(pairs)
            )
        )

    def _pairs_to_device(self, pairs: RoutedPairs) -> RoutedPairs:
        return RoutedPairs(pairs.row, pairs.expert, to_device(pairs.weight, self._device))


def request_batch_key(request: ExpertRequest) -> Hashable:
    """Return the key that requests of one function must share to be computed as one."""
    header = request.header
    return header.layer, header.dtype, header.mode, header.hidden_size


def concat_requests(requests: Sequence[ExpertRequest]) -> ExpertRequest:
    """Return one request with the rows of all, in order; all must have the same batch key."""
    if len(requests) == 1:
        return requests[0]
    first = requests[0].header
    n_rows = [r.header.n_rows for r in requests]
    header = FrameHeader(
        FrameKind.REQUEST,
        first.dtype,
        first.mode,
        first.layer,
        sum(n_rows),
        sum(r.header.n_pairs for r in requests),
        first.hidden_size,
    )
    row_offsets = np.cumsum([0, *n_rows[:-1]], dtype=np.int32)  # [requests]
    return ExpertRequest(
        header,
        np.concatenate([r.pair_row + n for r, n in zip(requests, row_offsets, strict=True)]),
        np.concatenate([r.pair_expert for r in requests]),
        np.concatenate([r.pair_weight for r in requests]),
        memoryview(bytearray().join(r.rows for r in requests)),
    )


def split_output(output: Tensor, requests: Sequence[ExpertRequest]) -> Iterator[Tensor]:
    """Yield each request's part of the output for `concat_requests(requests)`.

    Args:
        output: [T, H] in reduced mode, [P, H] in unreduced mode, of all requests.
        requests: the requests, in the same order.
    """
    start = 0
    for request in requests:
        header = request.header
        end = start + (header.n_pairs if header.mode is OutputMode.UNREDUCED else header.n_rows)
        yield output[start:end]  # [t, H] or [p, H]
        start = end
