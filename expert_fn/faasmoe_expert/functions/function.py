"""An attached expert function: the experts of one block, over one or several layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from faasmoe_expert.errors import BadAttachment, BadFrame, shown
from faasmoe_expert.functions.choice import Kernel, layer_kernel
from faasmoe_expert.functions.joining import joined, parts
from faasmoe_expert.functions.pairs import Pairs
from faasmoe_expert.functions.upload import Uploader
from faasmoe_expert.functions.verification import BlockGuard
from faasmoe_expert.store import Store
from faasmoe_expert.store.manifest import LayerEntry
from faasmoe_expert.table import FunctionSpec
from faasmoe_expert.wire import Dtype, Mode, Request

DTYPES = {
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
        layers = _layers(store, spec)
        self.size_bytes = size_of(spec, store)
        self._dtype = store.manifest.model.dtype
        self._hidden_size = {index: layer.hidden_size for index, layer in layers.items()}
        self._in_block = _membership(spec, layers)
        self._guards: dict[int, BlockGuard] = {}
        self._kernels: dict[int, Kernel] = {}
        for index, layer in layers.items():
            mapped = store.map_layer(index)
            mapped.populate(layer.num_experts, spec.experts)
            guard = BlockGuard(store, layer, mapped, spec.experts)
            guard.check()
            if uploader is None:  # what is copied needs no guard, nor the map
                self._guards[index] = guard
            self._kernels[index] = layer_kernel(store, layer, mapped, spec.experts, uploader)

    def compute(self, request: Request) -> Tensor:
        """Return the outputs of a frame on the CPU, in the frame's dtype.

        Returns:
            [T, H] in reduced mode, [P, H] in unreduced mode, contiguous.

        Raises:
            BadFrame: the frame does not fit this function.
            Corrupted: the function's bytes in the store have changed, and are wrong now.
        """
        self.check(request)
        return self.compute_together([request])[0]

    @torch.inference_mode()
    def compute_together(self, requests: Sequence[Request]) -> list[Tensor]:
        """Return what `compute` does for each of some requests, reading every weight once.

        Args:
            requests: alike (see joining.py) and checked.
        """
        request = joined(requests)
        output = self._run(request)
        # Asked afterwards, for the bytes that were read.
        while self._guards and self._guards[request.header.layer].check():
            output = self._run(request)
        self.n_frames += len(requests)
        return list(parts(output, requests))

    def _run(self, request: Request) -> Tensor:
        header = request.header
        dtype = DTYPES[header.dtype]
        hidden = torch.frombuffer(request.rows, dtype=dtype).view(header.n_rows, -1)  # [T, H]
        weight = torch.from_numpy(request.pair_weight)  # [P]
        pairs = Pairs(request.pair_row, request.pair_expert, weight)
        kernel = self._kernels[header.layer]
        compute = kernel.run if header.mode is Mode.UNREDUCED else kernel.sum
        return compute(hidden, pairs).contiguous()

    def check(self, request: Request) -> None:
        """Compare a frame with this function; raises BadFrame if it does not fit."""
        header = request.header
        if header.layer not in self._kernels:
            raise _bad(
                "layer", got=header.layer, expected=f"one of {shown(list(self.spec.layers))}"
            )
        if header.dtype.name.lower() != self._dtype:
            raise _bad("dtype", got=header.dtype.name.lower(), expected=self._dtype)
        hidden_size = self._hidden_size[header.layer]
        if header.hidden_size != hidden_size:
            raise _bad("hidden_size", got=header.hidden_size, expected=hidden_size)
        in_block = self._in_block
        outside = request.pair_expert >= len(in_block)
        if not outside.any():
            outside = ~in_block[request.pair_expert]
        if outside.any():
            experts = f"experts of this block: {shown(list(self.spec.experts))}"
            raise _bad("pair_expert", got=int(request.pair_expert[outside][0]), expected=experts)


def _bad(field: str, *, got: object, expected: object) -> BadFrame:
    return BadFrame(f"{field}: got {got}, expected {expected}", field=field)


def size_of(spec: FunctionSpec, store: Store) -> int:
    """Return the bytes of a function's parameters; raises BadAttachment if it has no such ones."""
    return sum(
        layer.expert_bytes * len(spec.experts) + layer.shared_bytes
        for layer in _layers(store, spec).values()
    )


def _layers(store: Store, spec: FunctionSpec) -> dict[int, LayerEntry]:
    return {index: _layer(store, index, spec) for index in spec.layers}


def _layer(store: Store, index: int, spec: FunctionSpec) -> LayerEntry:
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


def _membership(spec: FunctionSpec, layers: dict[int, LayerEntry]) -> NDArray[np.bool_]:
    in_block = np.zeros(max(layer.num_experts for layer in layers.values()), dtype=np.bool_)
    in_block[list(spec.experts)] = True
    return in_block
