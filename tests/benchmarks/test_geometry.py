"""Random checkpoints of the benchmarks."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks.geometry import make_checkpoint, qwen_geometry, small_geometry
from transformers import AutoModelForCausalLM

GEOMETRY = replace(small_geometry(), experts=32, hidden=256)


def _popularity(folder: Path, skew: float) -> torch.Tensor:
    """Return how often each expert of each layer is selected, [L, E], preferred experts first."""
    make_checkpoint(replace(GEOMETRY, skew=skew), folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    counts: list[torch.Tensor] = []

    def count(gate: torch.nn.Module, inputs: tuple[torch.Tensor], _: object) -> None:
        rows = inputs[0].reshape(-1, GEOMETRY.hidden)  # [T, H]
        weight = gate.get_parameter("weight")  # [E, H]
        selected = (rows @ weight.T).topk(GEOMETRY.top_k).indices  # [T, k]
        totals = torch.bincount(selected.flatten(), minlength=GEOMETRY.experts)  # [E]
        counts.append(totals[weight[:, 0].argsort(descending=True)])

    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(count)
    prompts = torch.randint(512, (16, 64), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        model(prompts)
    return torch.stack(counts).float()


def test_skewed_gate_prefers_some_experts_and_uses_most(tmp_path: Path) -> None:
    even = _popularity(tmp_path / "even", 0.0)
    skewed = _popularity(tmp_path / "skewed", 0.5)
    quarter = GEOMETRY.experts // 4
    for layer in range(GEOMETRY.layers):
        shares = [x[layer, :quarter].sum() / x[layer].sum() for x in (even, skewed)]
        assert shares[0] < 0.4
        assert 0.5 < shares[1] < 0.85
    assert (skewed > 0).float().mean() > 0.8


def test_name_contains_skew_only_if_set() -> None:
    assert qwen_geometry(4).name == "4-25344-2048-16-60-4-1408-5632"
    assert qwen_geometry(4, skew=0.5).name == "4-25344-2048-16-60-4-1408-5632-skew0.5"


@pytest.mark.parametrize("skew", [0.0, 0.5])
def test_weights_depend_only_on_geometry(tmp_path: Path, skew: float) -> None:
    for name in ("a", "b"):
        make_checkpoint(replace(small_geometry(), skew=skew), tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "a").glob("*.safetensors"))
    assert files
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
