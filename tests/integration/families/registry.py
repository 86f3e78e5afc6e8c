"""Tiny random models of every family that the experts interface of transformers covers.

`build` is deterministic and independent of earlier builds. The models are not pretrained, but they
route tokens and combine experts as their families do.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from families.entries import ENTRIES, FamilyEntry
from families.shrink import shrink
from families.weights import SEED, randomize_constants
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

UNBUILDABLE: Mapping[str, str] = {}
"""Families without a tiny model and the reason; currently none."""


@dataclass(frozen=True, slots=True)
class Family:
    """A family of MoE models.

    Attributes:
        name: its package in transformers.
        model_type: `model_type` of its configuration.
        build: builds a tiny model.
        note: remarks.
    """

    name: str
    model_type: str
    build: Callable[[], PreTrainedModel]
    note: str


def tiny_config(name: str) -> PretrainedConfig:
    """Return the tiny fp32 configuration of a family."""
    entry = ENTRIES[name]
    config = shrink(_config_class(_model_class(name, entry)), entry.overrides)
    config.dtype = torch.float32
    return config


def experts_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the experts modules of a model by name, in the order of `named_modules`."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "_is_expert_parallel")
    }


def forward_logits(family: Family, model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Run the model without a cache and return its logits, `[B, S, V]`."""
    inputs: dict[str, Any] = {"input_ids": input_ids}  # [B, S]
    if family.model_type == "diffusion_gemma":
        # The reversed prompt replaces the random canvas.
        inputs["decoder_input_ids"] = input_ids.flip(-1)  # [B, S]
    else:
        inputs["use_cache"] = False
    with torch.no_grad():
        logits = model(**inputs).logits  # [B, S, V]
    assert isinstance(logits, Tensor)
    return logits


def _build(name: str) -> PreTrainedModel:
    config = tiny_config(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model: PreTrainedModel = _model_class(name, ENTRIES[name])(config)
    randomize_constants(model)
    model.set_experts_implementation("eager")
    return model.eval()


def _model_class(name: str, entry: FamilyEntry) -> type[PreTrainedModel]:
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    model_class: type[PreTrainedModel] = getattr(module, entry.architecture)
    return model_class


def _config_class(model_class: type[PreTrainedModel]) -> type[PretrainedConfig]:
    for ancestor in model_class.__mro__:  # a mixin may precede the class that declares it
        declared = vars(ancestor).get("config_class")
        if declared is not None:
            config_class: type[PretrainedConfig] = declared
            return config_class
    raise TypeError(f"{model_class.__name__}: config_class: got None, expected a configuration")


def _family(name: str, entry: FamilyEntry) -> Family:
    return Family(
        name=name,
        model_type=_config_class(_model_class(name, entry)).model_type,
        build=partial(_build, name),
        note=entry.note,
    )


FAMILIES: tuple[Family, ...] = tuple(_family(name, entry) for name, entry in ENTRIES.items())
