"""Dtypes of a model: a family may keep some parameters in float32 whatever the model's dtype."""

from __future__ import annotations

import re

import torch
from torch import Tensor
from transformers import PreTrainedModel


class ParameterDtypes:
    """The dtype of each parameter as `from_pretrained` would load it.

    Args:
        model: the model, built in `dtype`.
        dtype: the model's dtype.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self._dtype_plan: list[tuple[re.Pattern[str], torch.dtype]] = [
            (re.compile(pattern.replace("*", ".*")), kept)
            for pattern, kept in model._get_dtype_plan(dtype).items()
        ]

    def dtype_of(self, name: str, parameter: Tensor) -> torch.dtype:
        """Return the dtype of the parameter `name`, which the model has as `parameter`."""
        for pattern, planned_dtype in self._dtype_plan:
            if pattern.search(name):
                return planned_dtype
        return parameter.dtype
