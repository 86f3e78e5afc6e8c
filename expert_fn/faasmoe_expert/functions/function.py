"""An attached expert function: the experts of one block, over one or several layers."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from faasmoe_expert.errors import BadAttachment, BadFrame, shown
from faasmoe_expert.functions.kernels import KernelSpec, run_gated, sum_gated
from faasmoe_expert.functions.module import ModuleKernel
from faasmoe_expert.functions.pairs import Pairs
from faasmoe_expert.functions.verification import BlockGuard
from faasmoe_expert.functions.weights import LayerWeights, map_weights
from faasmoe_expert.store import LayerMap, Store
from faasmoe_expert.store.manifest import LayerEntry
from faasmoe_expert.table import FunctionSpec
from faasmoe_expert.wire import Dtype, Mode, Request

DTYPES = {
    Dtype.BFLOAT16: torch.bfloat16,
    Dtype.FLOAT16: torch.float16,
    Dtype.FLOAT32: torch.float32,
}


class Kernel(Protocol):
    """What computes one layer's pairs."""

    def run(self, hidden: Tensor, pairs: Pairs) -> Tensor:
        """Return each pair's weighted output [P, H]."""

    def sum(self, hidden: Tensor, pairs: Pairs) -> Tensor:
        """Return the weighted sum of each row's experts [T, H]."""


class GatedKernel:
    """The lean kernel over one layer's mapped weights."""

    def __init__(self, spec: KernelSpec, weights: LayerWeights) -> None:
        self._spec = spec
        self._weights = weights.stacked

    def run(self, hidden: Tensor, pairs: Pairs) -> Tensor:
        """Return each pair's weighted output [P, H]."""
        return run_gated(self._spec, self._weights, hidden, pairs)

    def sum(self, hidden: Tensor, pairs: Pairs) -> Tensor:
        """Return the weighted sum of each row's experts [T, H]."""
        return sum_gated(self._spec, self._weights, hidden, pairs)


class ExpertFunction:
    """A function that is attached and can compute.

    Attributes:
        spec: its id, layers and experts.
        store_path: folder of the store that it was cut from.
        model_digest: the store's digest.
        size_bytes: bytes of its experts' parameters in the store.
        n_frames: frames computed so far.
    """

    def __init__(self, spec: FunctionSpec, store: Store, *, device: torch.device) -> None:
        self.spec = spec
        self.store_path = store.path
        self.model_digest = store.manifest.digest
        self.device = device
        self.n_frames = 0
        layers = {index: _layer(store, index, spec) for index in spec.layers}
        self.size_bytes = sum(
            layer.expert_bytes * len(spec.experts) + layer.shared_bytes for layer in layers.values()
        )
        self._dtype = store.manifest.model.dtype
        self._hidden_size = {index: layer.hidden_size for index, layer in layers.items()}
        self._in_block = _membership(spec, layers)
        self._guards: dict[int, BlockGuard] = {}
        self._kernels: dict[int, Kernel] = {}
        for index, layer in layers.items():
            mapped = store.map_layer(index)
            mapped.populate(layer.num_experts, spec.experts)
            self._guards[index] = BlockGuard(store, layer, mapped, spec.experts)
            self._guards[index].check()
            self._kernels[index] = _kernel(store, layer, mapped, spec, device)

    @torch.inference_mode()
    def compute(self, request: Request) -> Tensor:
        """Return the outputs of a frame on the CPU, in the frame's dtype.

        Returns:
            [T, H] in reduced mode, [P, H] in unreduced mode, contiguous.

        Raises:
            BadFrame: the frame does not fit this function.
            Corrupted: the function's bytes in the store have changed, and are wrong now.
        """
        self._check(request)
        output = self._run(request)
        # Asked afterwards, for the bytes that were read; on a device they are a copy.
        while self.device.type == "cpu" and self._guards[request.header.layer].check():
            output = self._run(request)
        self.n_frames += 1
        return output

    def _run(self, request: Request) -> Tensor:
        header = request.header
        dtype = DTYPES[header.dtype]
        hidden = torch.frombuffer(request.rows, dtype=dtype).view(header.n_rows, -1)  # [T, H]
        hidden = hidden.to(self.device)
        weight = torch.from_numpy(request.pair_weight).to(self.device)  # [P]
        pairs = Pairs(request.pair_row, request.pair_expert, weight)
        kernel = self._kernels[header.layer]
        compute = kernel.run if header.mode is Mode.UNREDUCED else kernel.sum
        return compute(hidden, pairs).cpu().contiguous()

    def _check(self, request: Request) -> None:
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


def _kernel(
    store: Store, layer: LayerEntry, mapped: LayerMap, spec: FunctionSpec, device: torch.device
) -> Kernel:
    model = store.manifest.model
    try:
        weights = map_weights(
            mapped, n_experts=layer.num_experts, experts=spec.experts, device=device
        )
        if layer.kernel is not None:
            return GatedKernel(KernelSpec.from_json(layer.kernel), weights)
        return ModuleKernel.from_store(
            store.path / "model", model.architecture, layer.name, weights, spec.experts, device
        )
    except (AttributeError, ImportError, KeyError, OSError, TypeError, ValueError) as error:
        raise BadAttachment(
            f"store: layer {layer.index} of {model.architecture} cannot be computed: {error}",
            field="store",
        ) from error
