"""Weights that are NaN or infinite are refused by file and tensor."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from faasmoe_router.checkpoint.__main__ import main
from faasmoe_router.checkpoint.finite_tensors import is_finite
from faasmoe_router.checkpoint.prepare import prepare
from faasmoe_router.errors import PrepareError

MakeCheckpoint = Callable[..., Path]
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
ROUTER = "model.layers.0.self_attn.q_proj.weight"


def spoil(checkpoint: Path, name: str, value: float) -> Path:
    """Set one weight of a checkpoint; return its file."""
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, file, metadata={"format": "pt"})
    return file


@pytest.mark.parametrize("name", [EXPERT, ROUTER])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weight_that_is_not_finite_is_refused(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, name: str, value: float
) -> None:
    checkpoint = make_checkpoint("mixtral")
    file = spoil(checkpoint, name, value)
    with pytest.raises(PrepareError) as caught:
        prepare(str(checkpoint), tmp_path / "store")
    assert f"{file}: {name}: got 1 values that are NaN or infinite" in str(caught.value)
    assert not (tmp_path / "store" / "manifest.json").exists()


def test_it_can_be_allowed(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint("mixtral")
    spoil(checkpoint, EXPERT, math.nan)
    command = ["prepare", str(checkpoint), str(tmp_path / "store")]
    assert main(command) != 0
    assert main([*command, "--allow-nonfinite"]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finite_values_are_accepted_whatever_their_sum(dtype: torch.dtype) -> None:
    largest = torch.full((1000,), torch.finfo(dtype).max, dtype=dtype)
    assert is_finite(largest)
    for value in (math.nan, math.inf, -math.inf):
        spoilt = largest.clone()
        spoilt[7] = value
        assert not is_finite(spoilt)
    opposite = torch.tensor([math.inf, -math.inf], dtype=dtype)
    assert not is_finite(opposite)


def test_codes_are_finite() -> None:
    assert is_finite(torch.zeros(3, dtype=torch.uint8))
    assert is_finite(torch.zeros(0))
