"""Linear layers and embeddings over weights as they lie in a store, with the kernel library.

A model that computes in float32 keeps the 16-bit weights of its linear layers and embeddings: the
kernels multiply them in float32, which loses nothing and reads half the bytes. Such weights are no
parameters of the model any more, so that its dtype stays float32; `module.weight` still is the
tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from faasmoe_kernels import KernelDtype, KernelLibrary, Matrix, Scheme
from faasmoe_kernels.router_ops import PreparedLinear

WEIGHT_SCHEMES = {
    torch.float32: Scheme.FLOAT32,
    torch.bfloat16: Scheme.BFLOAT16,
    torch.float16: Scheme.FLOAT16,
}
KERNEL_DTYPES = {
    torch.float32: KernelDtype.FLOAT32,
    torch.bfloat16: KernelDtype.BFLOAT16,
    torch.float16: KernelDtype.FLOAT16,
}
# A subclass may do more than the product, and use its weight in other ways.
_EXACT_TYPES = (nn.Linear, nn.Embedding)


def stored_weight_names(model: nn.Module) -> set[str]:
    """Return the names of the weights that may keep the store's dtype in a float32 model.

    A weight that a module of another type shares under the same name is not among them.
    """
    kept: set[str] = set()
    converted: set[str] = set()
    for prefix, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            full_name = f"{prefix}.{name}" if prefix else name
            is_kept = type(module) in _EXACT_TYPES and name == "weight"
            (kept if is_kept else converted).add(full_name)
    return kept - converted


def use_native_linears(model: nn.Module, library: KernelLibrary) -> int:
    """Have the linear layers and 16-bit embeddings of a float32 model computed by the kernels.

    Args:
        model: the model, on the CPU; modules with weights on the meta device stay as they are.
        library: the kernel library.

    Returns:
        The number of linear layers.
    """
    n_linears = 0
    for module in model.modules():
        if type(module) not in _EXACT_TYPES or isinstance(module.forward, NativeLinear):
            continue
        if module.weight.is_meta:
            continue
        if isinstance(module, nn.Linear):
            n_linears += 1
            weight, bias = module.weight.data.contiguous(), _float_bias(module)
            kept = (weight,) if bias is None else (weight, bias)
            set_forward(module, NativeLinear(library, matrix_of(weight, bias), kept))
        elif module.weight.dtype is not torch.float32:
            _use_stored_embedding(module)
        if module.weight.dtype is not torch.float32:
            _hide_weight(module)
    return n_linears


class NativeLinear:
    """The forward of one linear layer.

    Args:
        library: the kernel library.
        matrix: the weight [n, k].
        kept: the tensors that `matrix` points to.

    Attributes:
        matrix: the weight.
    """

    def __init__(self, library: KernelLibrary, matrix: Matrix, kept: Sequence[Tensor]) -> None:
        self.matrix = matrix
        self._kept = kept
        self._product = PreparedLinear(library, matrix)
        self._n, self._k = matrix.n, matrix.k

    def __call__(self, x: Tensor) -> Tensor:
        """Return x @ weight.T (+ bias), [..., n] in the dtype of `x` [..., k].

        Raises:
            ValueError: `x` has another last dimension than the weight.
        """
        dtype = KERNEL_DTYPES.get(x.dtype)
        if dtype is None:
            return self(x.float()).to(x.dtype)
        if x.shape[-1] != self._k:
            raise ValueError(f"x: got the shape {tuple(x.shape)}, expected [..., {self._k}]")
        rows = x.contiguous()
        out = torch.empty((*x.shape[:-1], self._n), dtype=x.dtype)
        n_rows = rows.numel() // self._k
        if n_rows:
            self._product(rows.data_ptr(), dtype, n_rows, out.data_ptr(), torch.get_num_threads())
        return out


def use_matrix(
    module: Any, matrix: Matrix, library: KernelLibrary, *, kept: Sequence[Tensor]
) -> None:
    """Have a linear layer computed with a weight that is no tensor of the model.

    Args:
        module: the layer; its weight is removed, its bias is used.
        matrix: the weight, without bias.
        library: the kernel library.
        kept: the tensors that `matrix` points to.
    """
    del module._parameters["weight"]
    bias = _float_bias(module)
    if bias is not None:
        matrix, kept = replace(matrix, bias=bias.data_ptr()), (*kept, bias)
    set_forward(module, NativeLinear(library, matrix, kept))


def _float_bias(module: nn.Linear) -> Tensor | None:
    return None if module.bias is None else module.bias.data.float().contiguous()  # [n]


def set_forward(module: Any, forward: Callable[..., Any]) -> None:
    """Replace a module's forward."""
    module.forward = forward


def matrix_of(weight: Tensor, bias: Tensor | None = None) -> Matrix:
    """Return a weight [n, k] as the kernels read it; the caller keeps both tensors alive.

    Args:
        weight: the weight, contiguous on the CPU.
        bias: float32 [n], contiguous; None without.
    """
    n, k = weight.shape
    return Matrix(
        scheme=WEIGHT_SCHEMES[weight.dtype],
        n=n,
        k=k,
        codes=weight.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
    )


def _use_stored_embedding(module: Any) -> None:
    weight = module.weight.data  # [V, H]

    def forward(token_ids: Tensor) -> Tensor:
        return F.embedding(token_ids, weight, module.padding_idx).float()

    module.forward = forward


def _hide_weight(module: Any) -> None:
    """Make the weight a plain attribute, which the model's parameters do not include."""
    weight = module.weight.data
    del module._parameters["weight"]
    module.weight = weight
