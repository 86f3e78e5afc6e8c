"""Entry point of vLLM's general plugins, which vLLM calls in each of its processes."""

from __future__ import annotations


def register() -> None:
    """Register the quantization config, the model loader and the operators."""
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.model_loader import register_model_loader

    from faasmoe_router.vllm_backend.operators import register_operators
    from faasmoe_router.vllm_backend.quantization import METHOD, FaasmoeQuantizationConfig
    from faasmoe_router.vllm_backend.weights import LOAD_FORMAT, StoreModelLoader
    from faasmoe_transformers.compiled_artifacts import make_loadable

    make_loadable()
    register_operators()
    register_quantization_config(METHOD)(FaasmoeQuantizationConfig)
    register_model_loader(LOAD_FORMAT)(StoreModelLoader)
