"""The quantization config `faasmoe`: routed experts without weights, whose outputs functions send.

vLLM asks a model's quantization config for the method of each layer. Ours answers for the routed
experts and for embeddings (embeddings.py), and leaves linear layers and attention to vLLM's methods
without quantization: the store's tensors come dequantised.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.runner.shared_experts import (
    SharedExperts,
    SharedExpertsOrder,
)
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.platforms import current_platform

from faasmoe_router.errors import RouterConfigError
from faasmoe_router.vllm_backend.embeddings import StoredEmbeddingMethod
from faasmoe_router.vllm_backend.expert_calls import current_calls, decoder_layer, expert_calls
from faasmoe_router.vllm_backend.operators import is_profiling

METHOD = "faasmoe"


class FunctionExpertsMethod(FusedMoEMethodBase):
    """Computes the routed experts of one layer through functions.

    Args:
        moe: vLLM's configuration of the layer.
        layer: index of the layer in the store.
    """

    def __init__(self, moe: FusedMoEConfig, layer: int) -> None:
        super().__init__(moe)
        self._layer = layer

    def create_weights(self, layer: RoutedExperts, *args: Any, **kwargs: Any) -> None:
        """Create none: the weights are the functions'."""

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig | None:
        """Return None: there are no weights."""
        return None

    @property
    def mk_can_overlap_shared_experts(self) -> bool:
        """True: `apply` is handed the shared experts, and runs them while calls are in flight."""
        return True

    @property
    def skip_forward_padding(self) -> bool:
        """True: hidden states are sent as they are."""
        return True

    def apply(
        self,
        layer: RoutedExperts,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: SharedExperts | None,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """Return the weighted sum of each token's experts, [T, H].

        Args:
            layer: the layer.
            x: hidden states, [T, H].
            topk_weights: routing weights, [T, k].
            topk_ids: experts, [T, k].
            shared_experts: the shared experts, whose output vLLM fetches itself; None for none.
            shared_experts_input: their input, [T, H].
        """

        def compute_shared() -> None:
            if shared_experts is not None:
                shared_experts(shared_experts_input, SharedExpertsOrder.MK_INTERNAL_OVERLAPPED)

        if torch.compiler.is_compiling():
            sent = torch.ops.vllm.faasmoe_send(x, topk_weights, topk_ids, self._layer)
            compute_shared()
            received: Tensor = torch.ops.vllm.faasmoe_receive(x, sent, self._layer)
            return received
        if is_profiling():
            compute_shared()
            return torch.zeros_like(x)
        return current_calls().compute(self._layer, x, topk_ids, topk_weights, compute_shared)


class FaasmoeQuantizationConfig(QuantizationConfig):
    """The quantization config of a model whose routed experts are functions."""

    @classmethod
    def get_name(cls) -> str:
        """Return the name under which it is registered."""
        return METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Return the dtypes that a router computes in."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the least capability of a device: none is needed."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no files: the config comes with the engine's arguments."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> FaasmoeQuantizationConfig:
        """Return the config, which has no fields."""
        return cls()

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return the method of a layer; None for vLLM's default.

        Raises:
            RouterConfigError: functions cannot compute a layer of routed experts.
        """
        if isinstance(layer, RoutedExperts):
            return _experts_method(layer, prefix)
        if isinstance(layer, VocabParallelEmbedding):
            return StoredEmbeddingMethod()
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


def _experts_method(layer: RoutedExperts, name: str) -> FunctionExpertsMethod:
    moe = layer.moe_config
    if layer.apply_router_weight_on_input:
        raise RouterConfigError(
            f"FAASMOE_ENGINE: got a model that applies routing weights to the experts' input "
            f"({name}), expected one that applies them to their output; use engine transformers"
        )
    parallel = moe.moe_parallel_config
    if parallel.dp_size * parallel.pcp_size * parallel.ep_size != 1:
        raise RouterConfigError(
            "FAASMOE_ENGINE_ARGS: got data, context or expert parallelism, expected none: experts "
            "are functions"
        )
    device = torch.device(current_platform.device_type)
    calls = expert_calls(device, is_caller=parallel.tp_rank == 0)
    index = calls.layer_index(
        name, decoder_layer(name), num_experts=moe.num_experts, hidden_size=moe.hidden_dim
    )
    return FunctionExpertsMethod(moe, index)
