"""The native kernel: computes gated experts on the mapped store with the kernel library.

One call of the library computes a frame: it reads the weights as they lie in the store, multiplies
and sums in float32, which is what reduced frames return. The bits of a row do not depend on the
other rows of a frame, in either mode.

Where oneDNN is fast in the layer's dtype, torch's blocked products overtake from some rows per
expert on: reduced frames with more are computed by the gated kernel there. Unreduced frames never
are, so that their bits stay the same.

Applies to the layers of the gated kernel whose weights are [out, in], on the CPU, in float32,
bfloat16, float16, or as codes and scales. Without the library, or with FAASMOE_KERNELS=off, torch
computes instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from faasmoe_contracts.store.manifest import LayerEntry
from faasmoe_expert.functions.kernels import CLAMPED_SWIGLU, KernelSpec, RoutedPairs
from faasmoe_expert.functions.stacks import QuantizedStack, ScatteredStack
from faasmoe_expert.functions.weights import LayerWeights
from faasmoe_kernels import (
    MATRIX_BYTES,
    Activation,
    Gating,
    KernelDtype,
    KernelLibrary,
    Matrix,
    ParameterDtype,
    Scheme,
    describe_cpu_kernels,
    matrix_table,
)
from faasmoe_kernels.function_layers import FunctionLayer, WeightsFile
from faasmoe_transformers.onednn import is_fast_on_cpu

ACTIVATIONS = {
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "gelu": Activation.GELU,
    "gelu_new": Activation.GELU_TANH,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "relu": Activation.RELU,
    "relu2": Activation.RELU2,
    "sigmoid": Activation.SIGMOID,
    CLAMPED_SWIGLU: Activation.CLAMPED_SWIGLU,
}
SCALE_DTYPES = {
    "float32": ParameterDtype.FLOAT32,
    "bfloat16": ParameterDtype.BFLOAT16,
    "float16": ParameterDtype.FLOAT16,
    "e8m0": ParameterDtype.E8M0,
    "e4m3": ParameterDtype.E4M3,
}
SCHEMES = {
    torch.float32: Scheme.FLOAT32,
    torch.bfloat16: Scheme.BFLOAT16,
    torch.float16: Scheme.FLOAT16,
}
PARAMETER_DTYPES = {
    torch.float32: ParameterDtype.FLOAT32,
    torch.bfloat16: ParameterDtype.BFLOAT16,
    torch.float16: ParameterDtype.FLOAT16,
}
QUANTIZED_SCHEMES = {
    "int8": Scheme.INT8,
    "int4": Scheme.INT4,
    "mxfp4": Scheme.MXFP4,
    "fp8": Scheme.FP8,
    "nvfp4": Scheme.NVFP4,
}
DTYPES = {
    torch.float32: KernelDtype.FLOAT32,
    torch.bfloat16: KernelDtype.BFLOAT16,
    torch.float16: KernelDtype.FLOAT16,
}


MAX_ROWS_PER_EXPERT = 24
"""Rows of one expert up to which the library is faster than a oneDNN with kernels for the dtype:
Qwen1.5-MoE's sizes, AVX-512 with bf16 (in float32 the library is faster up to 128 rows)."""


MAX_DIRECT_ROWS_PER_EXPERT = 16
"""The same for frames that bypass Python, which costs more than the difference up to here."""


MIN_ONEDNN_WEIGHTS = 1 << 20
"""Weights of an expert below which frames with any number of rows bypass Python: its products are
so small that the way through Python costs more than oneDNN saves."""


class LargeBatchKernel(Protocol):
    """Computes reduced frames with many rows per expert."""

    def compute_reduced(self, hidden: Tensor, pairs: RoutedPairs) -> Tensor:
        """Return the weighted sum over each row's experts, float32 [T, H]."""


class UnsupportedLayer(Exception):
    """The native kernel cannot compute this layer; the message says why."""


@dataclass(frozen=True, slots=True)
class NativeLayer:
    """One layer of a function as the kernel library computes it, for calls that bypass Python.

    Attributes:
        layer: index of the MoE layer.
        dtype: dtype of the rows.
        hidden_size: elements per row.
        first: descriptor of each expert's first projection, uint8 [E, MATRIX_BYTES]; zeros for
            experts outside the block.
        down: the same of its down projection.
        gating: what stands between the projections.
        max_rows_per_expert: rows of one expert above which another kernel is faster; 0 for never.
        files: the files that the weights are mapped from, with the identities of their verified
            content.
    """

    layer: int
    dtype: torch.dtype
    hidden_size: int
    first: NDArray[np.uint8]
    down: NDArray[np.uint8]
    gating: Gating
    max_rows_per_expert: int
    files: tuple[WeightsFile, ...]

    def describe(self) -> FunctionLayer:
        """Return the layer as the library knows it; valid while this object exists."""
        return FunctionLayer(
            layer=self.layer,
            hidden_size=self.hidden_size,
            n_experts=len(self.first),
            first=self.first.ctypes.data,
            down=self.down.ctypes.data,
            gating=self.gating,
            dtype=DTYPES[self.dtype],
            max_rows_per_expert=self.max_rows_per_expert,
            files=self.files,
        )


class NativeKernel:
    """Computes pairs of one layer with the kernel library.

    Args:
        spec: form of the kernel.
        weights: the layer's expert parameters, mapped.
        experts: global indices of the block's experts.
        library: the kernel library.
        large_batch_kernel: computes reduced frames with many rows per expert, where that is faster;
            None leaves all frames to the library.
        layer: index of the MoE layer.

    Attributes:
        name: name of the kernel and of the instruction set in use.

    Raises:
        UnsupportedLayer: the layer has another form, dtype or device.
    """

    def __init__(
        self,
        spec: KernelSpec,
        weights: LayerWeights,
        experts: Sequence[int],
        library: KernelLibrary,
        *,
        large_batch_kernel: LargeBatchKernel | None = None,
        layer: int = 0,
    ) -> None:
        if spec.activation not in ACTIVATIONS:
            raise UnsupportedLayer(f"activation {spec.activation}")
        self.name = f"native ({library.isa})"
        self._library = library
        self._layer = layer
        self._gating = Gating(
            ACTIVATIONS[spec.activation],
            is_gated=spec.name == "gated",
            interleaved=spec.interleaved,
            alpha=spec.alpha,
            limit=spec.limit,
        )
        first = "gate_up_proj" if spec.name == "gated" else "up_proj"
        self._first = _MatrixStack(spec, weights, first, experts)
        self._down = _MatrixStack(spec, weights, "down_proj", experts)
        self._large_batch_kernel = large_batch_kernel
        dtype = self._first.dtype
        self._is_onednn_fast = (
            dtype is not None and dtype is not torch.float32 and is_fast_on_cpu(dtype)
        )

    def native_layer(
        self, layer: LayerEntry, dtype: torch.dtype, files: tuple[WeightsFile, ...]
    ) -> NativeLayer:
        """Return what the library needs to compute this layer; valid while the kernel exists.

        Args:
            layer: manifest entry of the layer.
            dtype: dtype of the rows.
            files: the files that the weights are mapped from, as they were verified.
        """
        is_large = self._first.n_weights + self._down.n_weights >= MIN_ONEDNN_WEIGHTS
        is_limited = self._large_batch_kernel is not None and self._is_onednn_fast and is_large
        return NativeLayer(
            layer.index,
            dtype,
            layer.hidden_size,
            self._first.table,
            self._down.table,
            self._gating,
            MAX_DIRECT_ROWS_PER_EXPERT if is_limited else 0,
            files,
        )

    def compute_per_pair(self, hidden: Tensor, pairs: RoutedPairs) -> Tensor:
        """Return the weighted output of each pair, [P, H]."""
        out = hidden.new_empty(len(pairs), hidden.shape[1])  # [P, H]
        return self._compute(hidden, pairs, out, is_reduced=False)

    def compute_reduced(self, hidden: Tensor, pairs: RoutedPairs) -> Tensor:
        """Return the weighted sum over each row's experts, float32 [T, H]."""
        large = self._large_batch_kernel
        if large is not None and self._is_onednn_fast and _max_rows(pairs) > MAX_ROWS_PER_EXPERT:
            return large.compute_reduced(hidden, pairs)
        out = hidden.new_empty(hidden.shape, dtype=torch.float32)  # [T, H]
        return self._compute(hidden, pairs, out, is_reduced=True)

    def _compute(
        self, hidden: Tensor, pairs: RoutedPairs, out: Tensor, *, is_reduced: bool
    ) -> Tensor:
        hidden = hidden.contiguous()
        order = np.argsort(pairs.expert, kind="stable")  # [P]
        expert = pairs.expert[order]  # [P]
        starts = np.flatnonzero(np.diff(expert, prepend=-1))  # [G]
        group_sizes = np.diff(starts, append=len(expert))  # [G]
        first, down = self._first.table[expert[starts]], self._down.table[expert[starts]]
        rows = pairs.row[order].astype(np.int64)  # [P]
        weights = pairs.weight.numpy()[order].astype(np.float32, copy=False)  # [P]
        self._library.experts(
            first.ctypes.data,
            down.ctypes.data,
            self._gating,
            n_groups=len(starts),
            group_sizes=group_sizes.ctypes.data,
            pair_rows=rows.ctypes.data,
            pair_positions=0 if is_reduced else order.ctypes.data,
            pair_weights=weights.ctypes.data,
            x=hidden.data_ptr(),
            x_dtype=DTYPES[hidden.dtype],
            hidden_size=hidden.shape[1],
            rows=hidden.shape[0],
            is_reduced=is_reduced,
            out=out.data_ptr(),
            out_dtype=DTYPES[out.dtype],
            n_threads=torch.get_num_threads(),
            layer=self._layer,
        )
        return out


class _MatrixStack:
    """One projection of all experts of a layer, as the library reads it.

    Attributes:
        table: one descriptor per global expert index, uint8 [E, MATRIX_BYTES]; zeros, which the
            library rejects, for experts outside the block.
        dtype: dtype of the weights; None if they are codes.
        n_weights: weights of one expert.
    """

    def __init__(
        self, spec: KernelSpec, weights: LayerWeights, name: str, experts: Sequence[int]
    ) -> None:
        self._bias = _host_stack(weights, f"{name}_bias") if spec.bias else None  # [E, n]
        self._bias_dtype = ParameterDtype.FLOAT32
        if isinstance(self._bias, ScatteredStack) and len(self._bias.parts[0]) > 1:
            raise UnsupportedLayer(f"{name}_bias lies in parts")
        if self._bias is not None:
            self._bias_dtype = _parameter_dtype(f"{name}_bias", self._bias)
        self.dtype: torch.dtype | None = None
        stack = weights.stacked[name]
        if isinstance(stack, QuantizedStack):
            matrices = self._quantized_matrices(stack, experts)
        else:
            if spec.transposed:
                raise UnsupportedLayer("weights are [in, out]")
            matrices = self._float_matrices(_host_stack(weights, name), name, experts)
        self.n_weights = matrices[0].n * matrices[0].k if matrices else 0
        entries = np.frombuffer(matrix_table(matrices), dtype=np.uint8)
        n_experts = len(self._stack)
        self.table: NDArray[np.uint8] = np.zeros((n_experts, MATRIX_BYTES), dtype=np.uint8)
        self.table[list(experts)] = entries.reshape(len(experts), MATRIX_BYTES)

    def _float_matrices(
        self, stack: Tensor | ScatteredStack, name: str, experts: Sequence[int]
    ) -> list[Matrix]:
        scheme = SCHEMES.get(stack.dtype)
        if scheme is None:
            raise UnsupportedLayer(f"{name} has dtype {stack.dtype}")
        self._stack, self.dtype = stack, stack.dtype  # [E, n, k], kept alive for its addresses
        matrices = []
        for expert in experts:
            parts = stack.parts[expert] if isinstance(stack, ScatteredStack) else (stack[expert],)
            if len(parts) > 2:
                raise UnsupportedLayer(f"{name} lies in {len(parts)} parts")
            matrices.append(
                Matrix(
                    scheme,
                    sum(len(part) for part in parts),
                    parts[0].shape[1],
                    parts[0].data_ptr(),
                    bias=self._bias_address(expert),
                    bias_dtype=self._bias_dtype,
                    codes_upper=parts[1].data_ptr() if len(parts) == 2 else 0,
                )
            )
        return matrices

    def _quantized_matrices(self, stack: QuantizedStack, experts: Sequence[int]) -> list[Matrix]:
        self._stack = stack.codes  # [E, n, k] or [E, n, k / 2]
        self._parameters = stack.scales, stack.zeros, stack.factors  # as codes kept alive
        return [
            replace(
                quantized_matrix(stack, expert),
                bias=self._bias_address(expert),
                bias_dtype=self._bias_dtype,
            )
            for expert in experts
        ]

    def _bias_address(self, expert: int) -> int:
        if self._bias is None:
            return 0
        if isinstance(self._bias, ScatteredStack):
            (part,) = self._bias.parts[expert]
            return part.data_ptr()
        return self._bias[expert].data_ptr()


def quantized_matrix(stack: QuantizedStack, expert: int) -> Matrix:
    """Return one expert's parameter as the library reads it; valid while the stack exists.

    Raises:
        UnsupportedLayer: its codes lie in places that the library does not read.
    """
    entry = stack.quantization
    n, k = entry.shape
    codes, codes_upper = _addresses(stack.codes, expert)
    scales, scales_upper = _addresses(stack.scales, expert)
    zeros, zeros_upper = _addresses(stack.zeros, expert)
    factors, factors_upper = _addresses(stack.factors, expert)
    if zeros_upper or (scales_upper and zeros):
        raise UnsupportedLayer(f"{entry.scheme} zero points lie in two places")
    if entry.parts > 1:  # each part has rows of scales, and factors, of its own
        scales_upper = scales_upper or scales + _half_bytes(stack.scales)
        if stack.factors is not None:
            factors_upper = factors_upper or factors + _half_bytes(stack.factors)
    return Matrix(
        QUANTIZED_SCHEMES[entry.scheme],
        n,
        k,
        codes,
        scales=scales,
        zeros=zeros,
        group=entry.group,
        scale_dtype=SCALE_DTYPES[entry.scale_dtype],
        zero_dtype=ParameterDtype.UINT8 if zeros else ParameterDtype.FLOAT32,
        codes_upper=codes_upper,
        group_rows=entry.group_rows,
        scales_upper=scales_upper,
        factors=factors,
        factors_upper=factors_upper,
    )


def _addresses(stack: Tensor | ScatteredStack | None, expert: int) -> tuple[int, int]:
    """Return the address of an expert's rows, and of the upper half if it lies elsewhere, or 0."""
    if stack is None:
        return 0, 0
    if not isinstance(stack, ScatteredStack):
        return stack[expert].data_ptr(), 0
    parts = stack.parts[expert]
    if len(parts) > 2:
        raise UnsupportedLayer(f"codes lie in {len(parts)} parts")
    return parts[0].data_ptr(), parts[1].data_ptr() if len(parts) == 2 else 0


def _half_bytes(stack: Tensor | ScatteredStack) -> int:
    """Return the bytes of half an expert's rows."""
    return stack[0].nbytes // 2


def _parameter_dtype(name: str, tensor: Tensor | ScatteredStack) -> ParameterDtype:
    dtype = PARAMETER_DTYPES.get(tensor.dtype)
    if dtype is None:
        raise UnsupportedLayer(f"{name} has dtype {tensor.dtype}")
    return dtype


def _max_rows(pairs: RoutedPairs) -> int:
    """Return the rows of the expert with the most of them."""
    return int(np.bincount(pairs.expert).max(initial=0))


def _host_stack(weights: LayerWeights, name: str) -> Tensor | ScatteredStack:
    stack = weights.stacked[name]
    if isinstance(stack, ScatteredStack):
        return stack
    if not isinstance(stack, Tensor) or stack.device.type != "cpu":
        raise UnsupportedLayer(f"{name} is not in host memory")
    if not stack.is_contiguous():
        raise UnsupportedLayer(f"{name} is not contiguous")
    return stack


def describe_kernels(device: torch.device) -> str:
    """Return what computes gated experts on `device`: native kernels, or torch and the reason."""
    return describe_cpu_kernels() if device.type == "cpu" else f"torch (device {device})"
