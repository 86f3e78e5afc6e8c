"""The model's skeleton on the meta device: its class, parameters' names and shapes, its experts.

An experts module is one whose class transformers decorated with `use_experts_implementation`; this
is the seam through which every family is served, so a model without one is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from faasmoe_router.errors import SourceUnsupported

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
    """One experts module of the skeleton; `parameters` are on the meta device, by local name."""

    index: int
    name: str
    module: Any
    num_experts: int
    top_k: int
    parameters: Mapping[str, torch.Tensor]

    @property
    def hidden_size(self) -> int:
        """Width of the vectors that go into the experts."""
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
    """A model without weights, and what a store says of it."""

    model: PreTrainedModel
    config: PreTrainedConfig
    dtype: torch.dtype
    experts_modules: tuple[ExpertsModule, ...]

    @property
    def dtype_name(self) -> str:
        """The dtype as the manifest spells it."""
        return str(self.dtype).removeprefix("torch.")


def load_config(folder: Path) -> PreTrainedConfig:
    """Read the config of a checkpoint; raises PrepareError if transformers does not know it."""
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each family checks its config in its own way
        raise SourceUnsupported(
            f"{folder / 'config.json'}: rejected by transformers: {error}"
        ) from error


def build_skeleton(config: PreTrainedConfig, dtype: torch.dtype) -> ModelSkeleton:
    """Build the model of `config` on the meta device.

    Raises:
        PrepareError: the class is unknown, the dtype is not served, or there are no experts.
    """
    if dtype not in DTYPES.values():
        raise SourceUnsupported(f"dtype: got {dtype}, expected one of {', '.join(DTYPES)}")
    cls = _resolve_model_class(config)
    config.dtype = dtype
    for name in config.sub_configs:
        if (sub_config := getattr(config, name)) is not None:
            sub_config.dtype = dtype
    model = _init_on_meta(cls, config, dtype)
    return ModelSkeleton(model, config, dtype, find_experts_modules(model))


def _init_on_meta(
    cls: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype
) -> PreTrainedModel:
    with ExitStack() as stack:
        # The contexts of from_pretrained itself: parameters on meta, weights not tied.
        for context in cls.get_init_context(dtype, False, False, False):
            stack.enter_context(context)
        try:
            return cls(config)
        except Exception as error:  # sizes that cannot be, a class of another family, and so on
            raise SourceUnsupported(
                f"config.json: {cls.__name__} cannot be built from it: "
                f"{type(error).__name__}: {error}"
            ) from error


def find_experts_modules(model: PreTrainedModel) -> tuple[ExpertsModule, ...]:
    """Return the experts modules of `model` in the order of named_modules."""
    found = [(name, module) for name, module in model.named_modules() if is_experts_module(module)]
    if not found:
        raise SourceUnsupported(
            f"model: got family {model.config.model_type!r} (class {type(model).__name__}), which "
            "has no experts module, expected one that transformers decorates with "
            "use_experts_implementation (the ExpertsInterface)"
        )
    return tuple(
        _describe_experts_module(model, name, index=index) for index, (name, _) in enumerate(found)
    )


def _describe_experts_module(model: PreTrainedModel, name: str, *, index: int) -> ExpertsModule:
    module: Any = model.get_submodule(name)
    num_experts, top_k = int(module.num_experts), _top_k(model, name)
    if top_k > num_experts:
        raise SourceUnsupported(
            f"config: got {top_k} experts per token in {name}, expected at most {num_experts}, "
            "the experts that there are"
        )
    parameters = dict(module.named_parameters())
    return ExpertsModule(index, name, module, num_experts, top_k, parameters)


def is_experts_module(module: nn.Module) -> bool:
    """Tell whether transformers' `use_experts_implementation` decorated the module's class."""
    return hasattr(module, "_is_expert_parallel") and hasattr(module, "has_gate")


def _top_k(model: PreTrainedModel, name: str) -> int:
    """Return how many experts a token is sent to: the layer's own word first, then the config's."""
    parent = model.get_submodule(name.rpartition(".")[0])
    experts = model.get_submodule(name)
    config = getattr(experts, "config", model.config).get_text_config()
    for source in (parent, *parent.children(), config):
        for attribute in _TOP_K_ATTRIBUTES:
            value: Any = getattr(source, attribute, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    raise SourceUnsupported(
        f"config: got none of {', '.join(_TOP_K_ATTRIBUTES)} as an integer, "
        f"expected the number of experts per token of {name}"
    )


def _resolve_model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    names = config.architectures or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise SourceUnsupported(
            f"config.architectures: got {names!r}, expected a list of class names"
        )
    if not names and config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        names = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    if not names:
        raise SourceUnsupported(
            "config.architectures: got nothing, expected a class of transformers"
        )
    cls = getattr(transformers, names[0], None)
    if not isinstance(cls, type) or not issubclass(cls, PreTrainedModel):
        raise SourceUnsupported(
            f"config.architectures: got {names[0]!r}, expected a model class of transformers "
            f"{transformers.__version__}"
        )
    return cls
