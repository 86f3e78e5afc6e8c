"""Sampling defaults of a checkpoint: what its generation_config.json says, as vLLM honours it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from faasmoe_router.errors import RouterConfigError

GENERATION_CONFIG_NAME = "generation_config.json"
# Field of the file, its range, and the values that mean "not set" there.
_RANGES: Mapping[str, tuple[float, float]] = {
    "temperature": (0, 2),
    "top_p": (0, 1),
    "top_k": (-1, 1 << 31),
    "min_p": (0, 1),
    "repetition_penalty": (1e-6, 10),
    "max_new_tokens": (1, 1 << 31),
}


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """Values of parameters that a request does not set.

    Attributes:
        temperature: divides the scores.
        top_p: cumulative probability of the tokens to draw from.
        top_k: number of tokens to draw from; 0 or less keeps all.
        min_p: fraction of the highest probability that a token needs.
        repetition_penalty: penalty of tokens in the prompt or the output.
        max_new_tokens: tokens of a choice; None for what the endpoint gives.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int | None = None

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the file in a folder; without one, the defaults are OpenAI's.

        Raises:
            RouterConfigError: the file is invalid; the message names the field.
        """
        path = folder / GENERATION_CONFIG_NAME
        try:
            values: Any = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError) as error:
            raise RouterConfigError(f"{path}: cannot be read: {error}") from error
        if not isinstance(values, dict):
            raise RouterConfigError(f"{path}: got {type(values).__name__}, expected an object")
        fields = {name: values[name] for name in _RANGES if values.get(name) is not None}
        for name, value in fields.items():
            _check(path, name, value)
        return cls(**fields)


def _check(path: Path, name: str, value: Any) -> None:
    low, high = _RANGES[name]
    is_integer = name in ("top_k", "max_new_tokens")
    is_number = isinstance(value, int if is_integer else int | float)
    if isinstance(value, bool) or not is_number or not low <= value <= high:
        raise RouterConfigError(
            f"{path}: {name}: got {value!r}, expected {low:g} to {high:g}; "
            "FAASMOE_GENERATION_CONFIG=none (router.generationConfig: none) ignores the file"
        )
