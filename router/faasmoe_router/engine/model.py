"""The router's model: everything of a checkpoint but its routed experts, which stay on meta."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from accelerate import init_empty_weights
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from faasmoe_expert.store import Store
from faasmoe_router.dispatch import IMPLEMENTATION, bind_experts, register
from faasmoe_router.dispatch.experts import ComputesLayers

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class ModelError(Exception):
    """A store whose router tensors do not fit the model that its config describes."""


def load_router_model(
    store: Store, dispatcher: ComputesLayers, *, device: torch.device
) -> PreTrainedModel:
    """Build the family's model, fill in the router's tensors, and bind its experts to `dispatcher`.

    Expert parameters stay on the meta device: they cost no memory here.

    Raises:
        ModelError: the model is not known here; a file cannot be read; a tensor is missing,
            unknown or of another shape; the device has no room for them.
    """
    register()
    model = _empty_model(store)
    tensors: dict[str, Tensor] = {}
    for path in store.router_files():
        tensors |= _load(path, device)
    _fill(model, tensors, store)
    model.tie_weights()
    _check_filled(model, tensors, store)
    for module in model.modules():  # computed buffers, such as rotary frequencies
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.device != device:
                module._buffers[name] = buffer.to(device)
    bind_experts(model, [layer.name for layer in store.manifest.layers], dispatcher)
    return model.eval().requires_grad_(False)


def _empty_model(store: Store) -> PreTrainedModel:
    entry, folder = store.manifest.model, store.path / "model"
    config = _config(folder)
    model_class = getattr(transformers, entry.architecture, None)
    if model_class is None:
        raise ModelError(
            f"{store.path}: architecture: got {entry.architecture!r}, "
            f"which transformers {transformers.__version__} does not have"
        )
    with init_empty_weights(include_buffers=False):
        model = model_class._from_config(
            config, dtype=getattr(torch, entry.dtype), experts_implementation=IMPLEMENTATION
        )
    if (folder / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model


def _config(folder: Path) -> PretrainedConfig:
    try:
        return transformers.AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / 'config.json'}: {error}") from error


def _load(path: Path, device: torch.device) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path, device=str(device))
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: {error}") from error
    except torch.OutOfMemoryError as error:
        why = str(error).partition("\n")[0]
        raise ModelError(
            f"{path}: the router's part of the model does not fit on {device}: {why}"
        ) from error
    return tensors


def _fill(model: nn.Module, tensors: dict[str, Tensor], store: Store) -> None:
    try:
        left = model.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:
        raise ModelError(f"{store.path}: router tensors do not fit the model: {error}") from error
    if left.unexpected_keys:
        raise ModelError(
            f"{store.path}: got the tensor {left.unexpected_keys[0]!r} and "
            f"{len(left.unexpected_keys) - 1} more that the model does not have"
        )


def _check_filled(model: nn.Module, tensors: Mapping[str, Tensor], store: Store) -> None:
    """Parameters begin on meta; buffers do not, so those that a store must give are named."""
    experts = tuple(f"{layer.name}." for layer in store.manifest.layers)
    unfilled = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    buffers = dict(model.named_buffers())
    unfilled += [n for n in model.state_dict() if n in buffers and n not in tensors]
    empty = [name for name in unfilled if not name.startswith(experts)]
    if empty:
        raise ModelError(
            f"{store.path}: no tensor for {empty[0]!r} and {len(empty) - 1} more of the model"
        )
