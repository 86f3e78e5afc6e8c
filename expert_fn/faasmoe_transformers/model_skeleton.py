"""The skeleton of a checkpoint's model: class, parameter names and shapes, experts modules.

The model is built on the meta device from its config alone. An experts module is one whose class
transformers decorates with `use_experts_implementation`. Every family is served through that
interface, so a model without such a module is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from copy import copy, deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from faasmoe_transformers.errors import UnsupportedModel

DTYPES: Mapping[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
_TOP_K_ATTRIBUTES = (
    "num_experts_per_tok",
    "top_k",
    "moe_topk",
    "top_k_experts",
    "moe_top_k",
    "num_experts_per_token",
    "moe_k",
)


@dataclass(frozen=True, slots=True)
class ExpertsModule:
    """One experts module of a skeleton.

    Attributes:
        index: position among the model's experts modules.
        name: dotted name in the model.
        module: the module, on the meta device.
        num_experts: number of experts E.
        top_k: experts per token.
        parameters: the module's parameters on the meta device, by local name.
    """

    index: int
    name: str
    module: Any
    num_experts: int
    top_k: int
    parameters: Mapping[str, torch.Tensor]

    @property
    def hidden_size(self) -> int:
        """Width of the experts' inputs."""
        down = self.parameters.get("down_proj")  # [E, H, I], or [E, I, H] if transposed
        if down is None or down.dim() != 3:
            return int(self.module.config.get_text_config().hidden_size)
        return int(down.shape[2 if self.module.is_transposed else 1])

    @property
    def class_name(self) -> str:
        """Name of the family's class."""
        return type(self.module).__name__


@dataclass(frozen=True, slots=True)
class ModelSkeleton:
    """A model without weights.

    Attributes:
        model: the model on the meta device.
        config: its config.
        dtype: the dtype of its parameters, unless the family keeps some in another.
        experts_modules: its experts modules in the order of `named_modules`.
    """

    model: PreTrainedModel
    config: PreTrainedConfig
    dtype: torch.dtype
    experts_modules: tuple[ExpertsModule, ...]

    @property
    def dtype_name(self) -> str:
        """Name of the dtype, such as `bfloat16`."""
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True, slots=True)
class ExpertsForm:
    """How an experts module stores and uses its parameters.

    Attributes:
        is_gated: whether there is a gate projection beside the up projection.
        is_transposed: whether stacked weights are [E, in, out] rather than [E, out, in].
        is_interleaved: whether gate and up rows alternate; else all gate rows come first.
        is_biased: whether projections have biases.
    """

    is_gated: bool
    is_transposed: bool
    is_interleaved: bool
    is_biased: bool

    @classmethod
    def of(cls, module: Any) -> ExpertsForm:
        """Read the form off a decorated experts module."""
        return cls(
            is_gated=bool(module.has_gate),
            is_transposed=bool(module.is_transposed),
            is_interleaved=bool(module.has_gate and not module.is_concatenated),
            is_biased=bool(module.has_bias),
        )


def load_config(folder: Path) -> PreTrainedConfig:
    """Read the config of a checkpoint; raises UnsupportedModel if transformers rejects it."""
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each family validates its config in its own way
        raise UnsupportedModel(
            f"{folder / 'config.json'}: rejected by transformers: {error}"
        ) from error


def build_skeleton(config: PreTrainedConfig, dtype: torch.dtype) -> ModelSkeleton:
    """Build the model of `config` on the meta device.

    Raises:
        UnsupportedModel: the class is unknown or cannot be built, the dtype is not served, or the
            model has no experts module.
    """
    if dtype not in DTYPES.values():
        raise UnsupportedModel(f"dtype: got {dtype}, expected one of {', '.join(DTYPES)}")
    cls = _resolve_model_class(config)
    config.dtype = dtype
    for name in config.sub_configs:
        if (sub_config := getattr(config, name)) is not None:
            sub_config.dtype = dtype
    model = _init_on_meta(cls, config, dtype)
    return ModelSkeleton(model, config, dtype, find_experts_modules(model))


def find_experts_modules(model: PreTrainedModel) -> tuple[ExpertsModule, ...]:
    """Return the experts modules of `model` in the order of `named_modules`.

    Raises:
        UnsupportedModel: there is none, or its experts per token cannot be determined.
    """
    found = [(name, module) for name, module in model.named_modules() if is_experts_module(module)]
    if not found:
        raise UnsupportedModel(
            f"model: got family {model.config.model_type!r} (class {type(model).__name__}), which "
            "has no experts module, expected one that transformers decorates with "
            "use_experts_implementation (the ExpertsInterface)"
        )
    return tuple(
        _describe_experts_module(model, name, index=index) for index, (name, _) in enumerate(found)
    )


def is_experts_module(module: nn.Module) -> bool:
    """Tell whether transformers' `use_experts_implementation` decorated the module's class."""
    return hasattr(module, "_is_expert_parallel") and hasattr(module, "has_gate")


def eager_copy(module: Any) -> Any:
    """Return a copy of an experts module that is computed by the family's own forward."""
    copied: Any = deepcopy(module)
    copied.config = copy(module.config)
    copied.config._experts_implementation = "eager"
    return copied


def optional_parameter_patterns(model: PreTrainedModel) -> tuple[str, ...]:
    """Return regular expressions of the parameters that a checkpoint may lack."""
    return tuple(model._keys_to_ignore_on_load_missing or ())


def ignored_tensor_patterns(model: PreTrainedModel) -> tuple[str, ...]:
    """Return regular expressions of checkpoint tensors that the model does not use."""
    return tuple(model._keys_to_ignore_on_load_unexpected or ())


def initial_value(model: PreTrainedModel, name: str) -> torch.Tensor:
    """Return the initial value of a parameter or buffer of a meta model, on the CPU.

    The class initializes the tensor's module with this one tensor on the CPU, the rest on meta.
    """
    path, _, local_name = name.rpartition(".")
    module = model.get_submodule(path)
    old = getattr(module, local_name)
    value = torch.zeros(old.shape, dtype=old.dtype)
    setattr(
        module, local_name, nn.Parameter(value, False) if isinstance(old, nn.Parameter) else value
    )
    with torch.no_grad():
        model._init_weights(module)
    initialized: torch.Tensor = getattr(module, local_name).detach()
    setattr(module, local_name, old)
    return initialized


def _init_on_meta(
    cls: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype
) -> PreTrainedModel:
    with ExitStack() as stack:
        # The contexts of from_pretrained: parameters on meta, weights not tied.
        for context in cls.get_init_context(dtype, False, False, False):
            stack.enter_context(context)
        try:
            return cls(config)
        except Exception as error:  # impossible sizes, a class of another family, and so on
            raise UnsupportedModel(
                f"config.json: {cls.__name__} cannot be built from it: "
                f"{type(error).__name__}: {error}"
            ) from error


def _describe_experts_module(model: PreTrainedModel, name: str, *, index: int) -> ExpertsModule:
    module: Any = model.get_submodule(name)
    num_experts, top_k = int(module.num_experts), _top_k(model, name)
    if top_k > num_experts:
        raise UnsupportedModel(
            f"config: got {top_k} experts per token in {name}, expected at most {num_experts}, "
            "the number of experts"
        )
    parameters = dict(module.named_parameters())
    return ExpertsModule(index, name, module, num_experts, top_k, parameters)


def _top_k(model: PreTrainedModel, name: str) -> int:
    """Return the experts per token: of the layer's own modules if they say, else of the config."""
    parent = model.get_submodule(name.rpartition(".")[0])
    experts = model.get_submodule(name)
    config = getattr(experts, "config", model.config).get_text_config()
    for source in (parent, *parent.children(), config):
        for attribute in _TOP_K_ATTRIBUTES:
            value: Any = getattr(source, attribute, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    raise UnsupportedModel(
        f"config: got none of {', '.join(_TOP_K_ATTRIBUTES)} as an integer, "
        f"expected the number of experts per token of {name}"
    )


def _resolve_model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    names = config.architectures or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UnsupportedModel(
            f"config.architectures: got {names!r}, expected a list of class names"
        )
    if not names and config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        names = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    if not names:
        raise UnsupportedModel(
            "config.architectures: got nothing, expected a class of transformers"
        )
    cls = getattr(transformers, names[0], None)
    if not isinstance(cls, type) or not issubclass(cls, PreTrainedModel):
        raise UnsupportedModel(
            f"config.architectures: got {names[0]!r}, expected a model class of transformers "
            f"{transformers.__version__}"
        )
    return cls
