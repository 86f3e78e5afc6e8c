"""Builds models without weights and lays tensors under the names of their modules.

Imports transformers only when a model is built: a sandbox that uses lean kernels never needs it.
"""

from __future__ import annotations

import functools
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from faasmoe_transformers.errors import UnsupportedModel
from faasmoe_transformers.lazy_import import META_REGISTRATIONS, is_deferred, load_deferred
from faasmoe_transformers.version_check import check_private_names

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def build_from_config(
    config: PreTrainedConfig, architecture: str, *, experts_implementation: str, **options: Any
) -> PreTrainedModel:
    """Return a new model with the given experts implementation.

    The caller decides on which device parameters are created.

    Args:
        config: the model's config.
        architecture: name of the model's class in transformers.
        experts_implementation: name of a registered experts implementation, or "eager" for the
            family's own forward.
        options: further keyword arguments of the class's constructor from a config, such as dtype.

    Raises:
        UnsupportedModel: transformers has no class of that name.
    """
    import transformers

    model_class = getattr(transformers, architecture, None)
    if model_class is None:
        raise UnsupportedModel(
            f"architecture: got {architecture!r}, "
            f"which transformers {transformers.__version__} does not have"
        )
    options["experts_implementation"] = experts_implementation
    try:
        return model_class._from_config(config, **options)
    except NotImplementedError:
        if not is_deferred(META_REGISTRATIONS):
            raise
        load_deferred(META_REGISTRATIONS)  # few families compute with meta tensors
        return model_class._from_config(config, **options)


def copy_experts_module(model_dir: Path, architecture: str, name: str) -> Any:
    """Return a new experts module on the meta device, with its family's own forward.

    Args:
        model_dir: folder with config.json.
        architecture: name of the model's class in transformers.
        name: name of the module in the model.
    """
    return deepcopy(_eager_meta_model(model_dir, architecture).get_submodule(name))


@functools.lru_cache(maxsize=2)
def _eager_meta_model(model_dir: Path, architecture: str) -> nn.Module:
    load_deferred(META_REGISTRATIONS)
    check_private_names(("meta_model",))  # at start a sandbox checks torch only
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model_dir)
    with torch.device("meta"):
        model = build_from_config(config, architecture, experts_implementation="eager")
    return model.eval()  # type: ignore[no-any-return]


def set_num_experts(experts: Any, n_experts: int) -> None:
    """Tell an experts module that its stacked parameters hold `n_experts` experts."""
    experts.num_experts = n_experts


def replace_tensor(module: nn.Module, name: str, value: Tensor) -> None:
    """Put `value` in the place of a parameter or buffer, whatever its shape, dtype and device.

    Args:
        module: the module.
        name: dotted name of the parameter or buffer within it.
        value: the new tensor; a parameter gets no gradient.
    """
    owner_name, _, leaf = name.rpartition(".")
    owner: Any = module.get_submodule(owner_name)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[leaf] = value


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Move every buffer to `device`, including those outside the state dict."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.device != device:
                module._buffers[name] = buffer.to(device)
