"""Attention over transformers' paged cache with the kernel library, on a CPU.

An attention implementation that reads the cache in place: no keys are gathered, none are repeated
for the query heads that share them, and no masks are built. transformers accepts only its own
implementations when it creates a manager, so that this one is selected afterwards.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from faasmoe_kernels import KernelLibrary, KernelsUnavailable, load
from faasmoe_kernels.router_ops import Attention, AttentionBatch, PagedAttention
from faasmoe_transformers.native_linear import KERNEL_DTYPES

ATTENTION_IMPLEMENTATION = "faasmoe_paged"


def use_native_attention(model: Any) -> bool:
    """Select this implementation if the model computes in float32 on a CPU with the kernels.

    Args:
        model: a transformers model whose continuous batching manager exists.

    Returns:
        Whether it was selected.
    """
    if model.device.type != "cpu" or model.dtype is not torch.float32:
        return False
    try:
        library = load()
    except KernelsUnavailable:
        return False
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_IMPLEMENTATION, NativeAttention(library))
    model.set_attn_implementation(ATTENTION_IMPLEMENTATION)
    return bool(model.config._attn_implementation == ATTENTION_IMPLEMENTATION)


class NativeAttention:
    """The implementation, as transformers' modules call it.

    Args:
        library: the kernel library.
    """

    def __init__(self, library: KernelLibrary) -> None:
        self._attend = PagedAttention(library)
        self._layers: WeakKeyDictionary[Any, dict[int, Attention]] = WeakKeyDictionary()

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Return the attention's output, [1, T, H, D], and None for the weights.

        Args:
            module: the attention module.
            query: [1, H, T, D].
            key: [1, K, T, D], of the new tokens.
            value: [1, K, T, D], of the new tokens.
            attention_mask: None with a paged cache, of which the mask follows.
            scaling: factor of the scores; None for the square root of 1 / D.
            softcap: bound of the scores; None for none.
            s_aux: attention sinks [H]; None for none.
            cache: the paged cache; None without continuous batching.
            kwargs: further arguments of continuous batching and of the family.
        """
        if cache is None or not _is_supported(query, key, value, kwargs):
            mask = attention_mask if cache is None else _mask_of(cache, module.layer_idx, kwargs)
            if s_aux is not None or softcap is not None:
                raise NotImplementedError("attention with sinks or softcap of other than float32")
            return sdpa_attention_forward(  # type: ignore[no-any-return]
                *(module, query, key, value, mask), scaling=scaling, cache=cache, **kwargs
            )
        attention = self._attention(
            cache, module.layer_idx, query, scaling=scaling, softcap=softcap
        )
        sinks = None if s_aux is None else s_aux.detach().float().contiguous()  # [H]
        attention.sinks = None if sinks is None else sinks.data_ptr()
        batch = describe_batch(cache.layer_to_allocator[module.layer_idx], kwargs)
        return self._compute(attention, batch, query, key, value), None

    def _attention(
        self, cache: Any, layer: int, query: Tensor, *, scaling: float | None, softcap: float | None
    ) -> Attention:
        """Return the attention of a layer, described when it is first used with a cache."""
        layers = self._layers.setdefault(cache, {})
        attention = layers.get(layer)
        if attention is None:
            attention = layers[layer] = describe_attention(
                cache,
                layer,
                n_heads=query.shape[1],
                scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
                softcap=softcap or 0.0,
            )
        return attention

    def _compute(
        self, attention: Attention, batch: AttentionBatch, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        """Return the output [1, T, H, D] of the arguments of a call."""
        queries, keys, values = (
            x[0].transpose(0, 1).contiguous() for x in (query, key, value)
        )  # [T, H or K, D] each
        out = torch.empty_like(queries)
        self._attend(
            attention,
            batch,
            queries=queries.data_ptr(),
            query_stride=queries.shape[1] * queries.shape[2],
            keys=keys.data_ptr(),
            key_stride=keys.shape[1] * keys.shape[2],
            values=values.data_ptr(),
            value_stride=values.shape[1] * values.shape[2],
            out=out.data_ptr(),
            n_threads=torch.get_num_threads(),
        )
        return out.unsqueeze(0)


def describe_attention(
    cache: Any, layer: int, *, n_heads: int, scaling: float, softcap: float = 0.0
) -> Attention:
    """Return the attention of a layer over a paged cache, without sinks.

    Args:
        cache: transformers' paged cache.
        layer: the layer's index.
        n_heads: query heads.
        scaling: factor of the scores.
        softcap: bound of the scores; 0 for none.
    """
    allocator = cache.layer_to_allocator[layer]
    k_cache, v_cache = allocator._kv_token_views[layer]  # [slots, K, D] each
    n_slots = min(len(v) for views in allocator._kv_token_views.values() for v in views)
    return Attention(
        n_heads=n_heads,
        n_kv_heads=k_cache.shape[1],
        head_dim=k_cache.shape[2],
        window=getattr(allocator, "sliding_window", 0),
        n_slots=n_slots,
        k_cache=k_cache.data_ptr(),
        v_cache=v_cache.data_ptr(),
        cache_dtype=KERNEL_DTYPES[k_cache.dtype],
        scaling=scaling,
        softcap=softcap,
    )


def describe_batch(allocator: Any, kwargs: Any) -> AttentionBatch:
    """Return a batch as one kind of attention sees it; `kwargs` keeps its tensors alive.

    Args:
        allocator: the cache's allocator of that kind.
        kwargs: continuous batching's arguments of the model.
    """
    query_offsets = kwargs["cu_seq_lens_q"]  # int32 [R + 1]
    key_offsets = kwargs["cu_seq_lens_k"][allocator.layer_type]  # int32 [R + 1]
    read_index = kwargs["read_index"][allocator.index]  # int64 [keys], empty if none are cached
    return AttentionBatch(
        len(query_offsets) - 1,
        query_offsets.data_ptr(),
        key_offsets.data_ptr(),
        read_index.data_ptr() if len(read_index) else None,
        kwargs["write_index"][allocator.index].data_ptr(),
    )


def _is_supported(query: Tensor, key: Tensor, value: Tensor, kwargs: Any) -> bool:
    return (
        kwargs.get("position_bias") is None
        and query.dtype is key.dtype is value.dtype is torch.float32
        and query.shape[-1] == key.shape[-1] == value.shape[-1]
        and kwargs.get("block_table") is None
    )


def _mask_of(cache: Any, layer: int, kwargs: Any) -> Tensor:
    """Return which keys each row sees, [1, 1, T, N]."""
    allocator = cache.layer_to_allocator[layer]
    query_offsets = kwargs["cu_seq_lens_q"].tolist()
    key_offsets = kwargs["cu_seq_lens_k"][allocator.layer_type].tolist()
    window = getattr(allocator, "sliding_window", None)
    mask = torch.zeros(query_offsets[-1], key_offsets[-1], dtype=torch.bool)
    for i in range(len(query_offsets) - 1):
        rows = slice(query_offsets[i], query_offsets[i + 1])
        keys = slice(key_offsets[i], key_offsets[i + 1])
        n_rows, n_keys = rows.stop - rows.start, keys.stop - keys.start
        position = torch.arange(n_keys - n_rows, n_keys)[:, None]  # [rows, 1]
        key = torch.arange(n_keys)[None]  # [1, keys]
        is_seen = key <= position
        mask[rows, keys] = is_seen if window is None else is_seen & (key > position - window)
    return mask[None, None]
