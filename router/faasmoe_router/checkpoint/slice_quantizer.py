"""Quantises a checkpoint's parameters slice by slice as they stream into a store."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from faasmoe_contracts.store import TensorQuantization
from faasmoe_contracts.store.quantization import SCALE_SUFFIX
from faasmoe_router.checkpoint.quantizer import quantize
from faasmoe_router.errors import SourceUnsupported
from faasmoe_transformers.weight_conversion import ParameterSlice

Losses = dict[str, tuple[float, float]]
"""Sums of squared errors and of squared weights, by parameter."""


class QuantizationLoss:
    """What quantisation lost so far, by parameter.

    Args:
        losses: of the parameters in files that an earlier, interrupted preparation finished.
    """

    def __init__(self, losses: Mapping[str, tuple[float, float]]) -> None:
        self._losses: Losses = dict(losses)

    def add(self, name: str, squared_error: float, squared_norm: float) -> None:
        """Add the loss of a slice of a parameter."""
        error, norm = self._losses.get(name, (0.0, 0.0))
        self._losses[name] = (error + squared_error, norm + squared_norm)

    def of_tensors(self, names: Iterable[str]) -> Losses:
        """Return the losses of the quantised ones of some parameters."""
        return {name: self._losses[name] for name in names if name in self._losses}

    def add_to(self, quantized: Mapping[str, TensorQuantization]) -> dict[str, TensorQuantization]:
        """Return the entries with norms and relative errors."""
        entries: dict[str, TensorQuantization] = {}
        for name, quantization in quantized.items():
            error, norm = self._losses[name]
            relative_error = math.sqrt(error / norm) if norm else 0.0
            entries[name] = replace(
                quantization, norm=math.sqrt(norm), relative_error=relative_error
            )
        return entries


class SliceQuantizer:
    """Replaces slices of quantised parameters by slices of codes and of scales.

    Args:
        quantization: how each quantised parameter is stored, by its name.
        loss: what is lost is added to it.
    """

    def __init__(
        self, quantization: Mapping[str, TensorQuantization], loss: QuantizationLoss
    ) -> None:
        self._quantization = quantization
        self._loss = loss

    def quantize(self, parameter_slice: ParameterSlice) -> Iterator[ParameterSlice]:
        """Yield what is stored of a slice: the slice itself, or its codes and scales.

        Raises:
            SourceUnsupported: weights are not finite, or too large for a squared error in float32.
        """
        name = parameter_slice.target
        quantization = self._quantization.get(name)
        if quantization is None:
            yield parameter_slice
            return
        result = quantize(parameter_slice.tensor, quantization)
        if not math.isfinite(result.squared_error + result.squared_norm):
            raise SourceUnsupported(
                f"{name}: got weights that are not finite or exceed 1e18, expected such that can "
                f"be quantised as {quantization.scheme}"
            )
        self._loss.add(name, result.squared_error, result.squared_norm)
        yield replace(parameter_slice, tensor=result.codes)
        yield replace(parameter_slice, target=name + SCALE_SUFFIX, tensor=result.scales)
