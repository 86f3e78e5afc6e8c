"""The model loader `faasmoe`: the router's tensors of the store, and no expert's.

The store names them as transformers' model does; vLLM's model maps the names that checkpoints have
to its own. Every parameter must get a tensor, but for the biases that vLLM's class always has and
the model does not: these are zero.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from vllm.config import ModelConfig
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from faasmoe_contracts.store import Store, StoreError
from faasmoe_contracts.store.quantization import SCALE_SUFFIX
from faasmoe_expert.functions.dequantization import dequantize
from faasmoe_router.errors import RouterConfigError, RouterWeightsChanged
from faasmoe_router.referenced_tensors import map_referenced_tensors
from faasmoe_router.vllm_backend.compatibility import checkpoint_name
from faasmoe_router.vllm_backend.embeddings import map_embeddings
from faasmoe_router.vllm_backend.expert_calls import current_calls

LOAD_FORMAT = "faasmoe"


class StoreModelLoader(BaseModelLoader):
    """Loads the router's tensors of a store into vLLM's model.

    Args:
        load_config: vLLM's settings of the loader.
    """

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(load_config)

    def download_model(self, model_config: ModelConfig) -> None:
        """Download nothing: the store is complete."""

    def load_weights(self, model: Any, model_config: ModelConfig) -> None:
        """Load the weights; raises RouterConfigError naming a tensor that does not fit."""
        store = current_calls().store
        architecture = store.manifest.model.architecture
        tensors = (
            (checkpoint_name(name, architecture), tensor)
            for name, tensor in router_tensors(store, dtype=model_config.dtype)
        )
        map_embeddings(model)
        try:
            loaded = model.load_weights(tensors)
        except (KeyError, ValueError, AssertionError) as error:
            raise RouterConfigError(
                f"FAASMOE_STORE: {store.path}: the router's tensors do not fit vLLM's "
                f"{architecture}: {error}"
            ) from error
        _fill_missing(model, loaded, store)


def router_tensors(store: Store, *, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield the router's tensors by their name in transformers' model, dequantised.

    Args:
        store: the prepared model.
        dtype: dtype of the weights that the store holds as codes.

    Raises:
        RouterConfigError: a file or the checkpoint cannot be read.
    """
    try:
        referenced, _ = map_referenced_tensors(store)
        yield from referenced.items()
        for path in store.router_files():
            with safe_open(path, framework="pt") as file:
                yield from _read_file(file, store, dtype)
    except (OSError, SafetensorError, StoreError, RouterWeightsChanged) as error:
        raise RouterConfigError(f"FAASMOE_STORE: {error}") from error


def _read_file(file: safe_open, store: Store, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    codes = {f"{module}.weight": entry for module, entry in store.manifest.router.quantized.items()}
    for name in file.offset_keys():
        if name.endswith(SCALE_SUFFIX) and name.removesuffix(SCALE_SUFFIX) in codes:
            continue
        tensor = file.get_tensor(name)
        if name in codes:
            scales = file.get_tensor(name + SCALE_SUFFIX)
            tensor = dequantize(tensor, scales, codes[name]).to(dtype)
        yield name, tensor


def _fill_missing(model: nn.Module, loaded: Collection[str], store: Store) -> None:
    """Set biases without a tensor to zero; raise RouterConfigError for any other parameter."""
    for name, parameter in model.named_parameters():
        if name in loaded:
            continue
        if not name.endswith(".bias"):
            raise RouterConfigError(
                f"FAASMOE_STORE: {store.path}: no tensor for {name!r} of vLLM's model"
            )
        parameter.data.zero_()
