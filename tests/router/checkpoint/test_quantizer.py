"""Codes and scales against references in numpy, written independently of the quantiser."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from faasmoe_expert.functions.dequantization import dequantize
from faasmoe_router.checkpoint import quantizer
from faasmoe_router.checkpoint.quantizer import choose_quantization, quantize

SCHEMES = ("int8", "int4", "mxfp4")
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def random_weights(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return (torch.randn(shape, generator=generator) / 50).to(dtype)


def reference_values(codes: Tensor, scales: Tensor, scheme: str) -> NDArray[Any]:
    """Return the weights of codes and scales in float64, by the definition in docs/store.md."""
    raw = codes.numpy()
    if scheme == "int8":
        values = raw.astype(np.float64)
    else:
        nibbles = np.empty((*raw.shape[:-1], 2 * raw.shape[-1]), dtype=np.uint8)
        nibbles[..., ::2], nibbles[..., 1::2] = raw & 15, raw >> 4
        values = nibbles - 8.0 if scheme == "int4" else E2M1[nibbles]
    if scheme == "mxfp4":
        scale = 2.0 ** (scales.numpy().astype(np.float64) - 127)
    else:
        scale = scales.double().numpy()
    return np.asarray(values * np.repeat(scale, values.shape[-1] // scale.shape[-1], axis=-1))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("columns", [96, 40])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_dequantises_to_the_defined_values_near_the_weights(
    scheme: str, columns: int, transposed: bool
) -> None:
    weights = random_weights(3, 20, columns)
    stored = weights.transpose(1, 2).contiguous() if transposed else weights
    quantization = choose_quantization(scheme, tuple(stored.shape), transposed=transposed)
    if quantization is None:
        assert scheme == "mxfp4"
        assert columns == 40
        return
    assert quantization.group == (32 if columns == 96 else 0)
    result = quantize(stored, quantization)
    assert tuple(result.codes.shape[1:]) == quantization.codes_shape
    assert tuple(result.scales.shape[1:]) == quantization.scales_shape
    expected = reference_values(result.codes, result.scales, scheme)  # [3, 20, K]
    got = dequantize(result.codes, result.scales, quantization)
    assert got.shape == stored.shape
    got = got.transpose(1, 2) if transposed else got
    assert np.array_equal(got.numpy().astype(np.float64), expected.astype(np.float32))
    error = np.linalg.norm(expected - weights.double().numpy())
    norm = weights.double().norm().item()
    assert result.squared_error**0.5 == pytest.approx(error, rel=1e-4)
    assert result.squared_norm**0.5 == pytest.approx(norm, rel=1e-6)
    assert error / norm < {"int8": 8e-3, "int4": 0.11, "mxfp4": 0.13}[scheme]


def test_int8_errors_are_at_most_half_a_step() -> None:
    weights = random_weights(40, 64)
    quantization = choose_quantization("int8", (40, 64), transposed=False)
    assert quantization is not None
    result = quantize(weights, quantization)
    error = (dequantize(result.codes, result.scales, quantization) - weights).abs()
    step = result.scales.float().repeat_interleave(32, dim=1)
    assert bool((error <= 0.5001 * step).all())
    assert result.codes.abs().max() <= 127
    largest = weights.view(40, 2, 32).abs().amax(-1)
    assert bool((result.scales.float() <= largest / 127 * (1 + 2**-7)).all())


def test_int4_is_no_worse_than_plain_rounding() -> None:
    weights = random_weights(200, 32)
    quantization = choose_quantization("int4", (200, 32), transposed=False)
    assert quantization is not None
    result = quantize(weights, quantization)
    error = (dequantize(result.codes, result.scales, quantization) - weights).square().sum(1)
    extreme = weights.gather(1, weights.abs().argmax(1, keepdim=True))  # as llama.cpp's Q4_0
    scale = extreme / -8
    plain = ((weights / scale).round().clamp(-8, 7) * scale - weights).square().sum(1)
    assert bool((error <= plain * 1.02).all())  # bfloat16 scales
    assert error.sum() < 0.93 * plain.sum()


def test_mxfp4_takes_the_nearest_value_under_the_better_power_of_two() -> None:
    weights = random_weights(60, 32)
    quantization = choose_quantization("mxfp4", (60, 32), transposed=False)
    assert quantization is not None
    result = quantize(weights, quantization)
    error = (dequantize(result.codes, result.scales, quantization) - weights).square().sum(1)
    best = torch.full((60,), torch.inf)
    for exponent in range(-12, 0):
        values = torch.from_numpy(E2M1) * 2.0**exponent
        nearest = (weights[..., None] - values).abs().min(-1).values
        best = torch.minimum(best, nearest.square().sum(1).float())
    torch.testing.assert_close(error, best, rtol=1e-4, atol=0)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("value", [0.0, 1e-38, -1e-30, 1e17])
def test_extreme_weights_keep_their_size(scheme: str, value: float) -> None:
    weights = torch.full((2, 64), value)
    quantization = choose_quantization(scheme, (2, 64), transposed=False)
    assert quantization is not None
    result = quantize(weights, quantization)
    got = dequantize(result.codes, result.scales, quantization)
    torch.testing.assert_close(got, weights, rtol=0.26, atol=0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_result_does_not_depend_on_chunks(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = random_weights(3, 20, 64, dtype=torch.bfloat16)
    quantization = choose_quantization(scheme, (3, 20, 64), transposed=False)
    assert quantization is not None
    whole = quantize(weights, quantization)
    monkeypatch.setattr(quantizer, "CHUNK_ELEMENTS", 7 * 64)
    parts = quantize(weights, quantization)
    assert torch.equal(parts.codes, whole.codes)
    assert torch.equal(parts.scales.view(torch.uint8), whole.scales.view(torch.uint8))
    one = quantize(weights[1:2, 4:9], quantization)  # rows of the whole
    assert torch.equal(one.codes, whole.codes[1:2, 4:9])


def test_four_bits_need_an_even_number_of_columns() -> None:
    assert choose_quantization("int4", (4, 33), transposed=False) is None
    assert choose_quantization("mxfp4", (4, 33), transposed=False) is None
    assert choose_quantization("int8", (4, 33), transposed=False) is not None
