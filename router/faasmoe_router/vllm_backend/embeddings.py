"""Embeddings and output layers of vLLM's model, without copies that nothing reads.

By itself vLLM copies both out of the store, and on a CPU packs a second copy of each for products.
Embeddings are never multiplied, and an output layer computes with its packed copy only. So where
the store has a tensor in the dtype to compute in, the parameter is that tensor, mapped, and only
output layers are packed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.platforms import current_platform

from faasmoe_transformers.tensor_pages import release_file_pages

LoadTensor = Callable[[nn.Parameter, Tensor], None]


class StoredEmbeddingMethod(UnquantizedEmbeddingMethod):
    """Looks up rows in the weights as they are loaded; packs those of output layers."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Pack the weights of an output layer; those of embeddings stay as they are.

        Either way few of their pages are read from now on. The verification of the store's tensors
        has read them all.
        """
        if isinstance(layer, ParallelLMHead):
            super().process_weights_after_loading(layer)
        weight = layer.weight
        assert isinstance(weight, Tensor)
        release_file_pages(weight)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return logits, [T, V]; packs the weights of embeddings that are the output layer, too.

        Args:
            layer: the layer.
            x: hidden states, [T, H].
            bias: [V]; None without one.
        """
        if current_platform.is_cpu() and not hasattr(layer, "cpu_linear"):
            super().process_weights_after_loading(layer)
        logits: Tensor = super().apply(layer, x, bias)
        return logits


def map_embeddings(model: nn.Module) -> None:
    """Have embeddings and output layers take the loaded tensors themselves where these fit."""
    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding):
            weight = module.weight
            weight.weight_loader = partial(take_or_copy, copy=weight.weight_loader)


def take_or_copy(parameter: nn.Parameter, tensor: Tensor, *, copy: LoadTensor) -> None:
    """Make a loaded tensor the data of a parameter; copy one of another dtype, shape or device.

    Args:
        parameter: the parameter.
        tensor: what was loaded; never written to.
        copy: copies it into the parameter, or the worker's part of it.
    """
    kinds = [(t.shape, t.dtype, t.device, t.is_contiguous()) for t in (parameter, tensor)]
    if kinds[0] == kinds[1]:
        parameter.data = tensor
    else:
        copy(parameter, tensor)
