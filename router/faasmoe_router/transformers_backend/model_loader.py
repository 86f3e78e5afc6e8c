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

from faasmoe_contracts.store import Store
from faasmoe_router.dispatch import EXPERTS_IMPLEMENTATION, bind_experts, register_implementation
from faasmoe_router.dispatch.experts_backend import MoELayerComputer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class ModelLoadError(Exception):
    """A store whose router tensors do not fit the model that its config describes."""


def load_router_model(
    store: Store, dispatcher: MoELayerComputer, *, device: torch.device
) -> PreTrainedModel:
    """Build the family's model, fill in the router's tensors, and bind its experts to `dispatcher`.

    Expert parameters stay on the meta device: they cost no memory here.

    Raises:
        ModelError: the model is not known here; a file cannot be read; a tensor is missing,
            unknown or of another shape; the device has no room for them.
    """
    register_implementation()
    model = _build_meta_model(store)
    tensors: dict[str, Tensor] = {}
    for path in store.router_files():
        tensors |= _read_tensors(path, device)
    _assign_tensors(model, tensors, store)
    model.tie_weights()
    _check_all_assigned(model, tensors, store)
    for module in model.modules():  # computed buffers, such as rotary frequencies
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.device != device:
                module._buffers[name] = buffer.to(device)
    bind_experts(model, [layer.name for layer in store.manifest.layers], dispatcher)
    return model.eval().requires_grad_(False)


def _build_meta_model(store: Store) -> PreTrainedModel:
    entry, folder = store.manifest.model, store.path / "model"
    config = _load_config(folder)
    model_class = getattr(transformers, entry.architecture, None)
    if model_class is None:
        raise ModelLoadError(
            f"{store.path}: architecture: got {entry.architecture!r}, "
            f"which transformers {transformers.__version__} does not have"
        )
    with init_empty_weights(include_buffers=False):
        model = model_class._from_config(
            config, dtype=getattr(torch, entry.dtype), experts_implementation=EXPERTS_IMPLEMENTATION
        )
    if (folder / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model


def _load_config(folder: Path) -> PretrainedConfig:
    try:
        return transformers.AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{folder / 'config.json'}: {error}") from error


def _read_tensors(path: Path, device: torch.device) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path, device=str(device))
    except (OSError, SafetensorError) as error:
        raise ModelLoadError(f"{path}: {error}") from error
    except torch.OutOfMemoryError as error:
        reason = str(error).partition("\n")[0]
        raise ModelLoadError(
            f"{path}: the router's part of the model does not fit on {device}: {reason}"
        ) from error
    return tensors


def _assign_tensors(model: nn.Module, tensors: dict[str, Tensor], store: Store) -> None:
    try:
        incompatible_keys = model.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:
        raise ModelLoadError(
            f"{store.path}: router tensors do not fit the model: {error}"
        ) from error
    if incompatible_keys.unexpected_keys:
        raise ModelLoadError(
            f"{store.path}: got the tensor {incompatible_keys.unexpected_keys[0]!r} and "
            f"{len(incompatible_keys.unexpected_keys) - 1} more that the model does not have"
        )


def _check_all_assigned(model: nn.Module, tensors: Mapping[str, Tensor], store: Store) -> None:
    """Parameters begin on meta; buffers do not, so those that a store must give are named."""
    expert_prefixes = tuple(f"{layer.name}." for layer in store.manifest.layers)
    unassigned = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    buffers = dict(model.named_buffers())
    unassigned += [n for n in model.state_dict() if n in buffers and n not in tensors]
    missing = [name for name in unassigned if not name.startswith(expert_prefixes)]
    if missing:
        raise ModelLoadError(
            f"{store.path}: no tensor for {missing[0]!r} and {len(missing) - 1} more of the model"
        )
