"""Custom operators for a layer's calls: opaque to torch.compile and to CUDA graphs.

Compiled code runs what lies between `faasmoe_send` and `faasmoe_receive`, the shared experts, while
the calls are in flight. The tensor that one returns and the other takes orders them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import direct_register_custom_op

from faasmoe_router.vllm_backend.expert_calls import current_calls

NAMES = ("faasmoe_send", "faasmoe_receive")


def is_profiling() -> bool:
    """Whether vLLM runs its model without requests, to measure memory or to compile.

    Functions are not called then: there are no tokens, and at the start no functions yet.
    """
    return get_forward_context().attn_metadata is None


def send(hidden: Tensor, top_k_weight: Tensor, top_k_index: Tensor, layer: int) -> Tensor:
    """Send a layer's calls; return a tensor for `receive`.

    Args:
        hidden: [T, H].
        top_k_weight: [T, k].
        top_k_index: [T, k].
        layer: index of the layer in the store.
    """
    if not is_profiling():
        current_calls().send(layer, hidden, top_k_index, top_k_weight)
    return hidden.new_empty(1)


def receive(hidden: Tensor, sent: Tensor, layer: int) -> Tensor:
    """Return the weighted sum of each token's experts, [T, H].

    Args:
        hidden: what was sent, [T, H].
        sent: what `send` returned.
        layer: index of the layer in the store.
    """
    if is_profiling():
        return torch.zeros_like(hidden)
    return current_calls().receive(layer, hidden)


def _send_fake(hidden: Tensor, top_k_weight: Tensor, top_k_index: Tensor, layer: int) -> Tensor:
    return hidden.new_empty(1)


def _receive_fake(hidden: Tensor, sent: Tensor, layer: int) -> Tensor:
    return torch.empty_like(hidden)


def register_operators() -> None:
    """Register the operators; does nothing the second time."""
    if hasattr(torch.ops.vllm, NAMES[0]):
        return
    direct_register_custom_op(op_name=NAMES[0], op_func=send, fake_impl=_send_fake)
    direct_register_custom_op(op_name=NAMES[1], op_func=receive, fake_impl=_receive_fake)
