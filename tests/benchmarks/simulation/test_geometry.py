"""Sizes of published models, counted from their configs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks.simulation.errors import SimulationError
from benchmarks.simulation.geometry import PUBLISHED, from_config, load_geometry


@pytest.mark.parametrize(
    ("name", "parameters_billion", "n_layers", "num_experts"),
    [
        pytest.param("qwen3-235b", 235.1, 94, 128, id="qwen3"),
        pytest.param("deepseek-v3", 671.0, 58, 256, id="deepseek"),
        pytest.param("kimi-k2", 1026.4, 60, 384, id="kimi"),
    ],
)
def test_counts_the_published_number_of_parameters(
    name: str, parameters_billion: float, n_layers: int, num_experts: int
) -> None:
    geometry = load_geometry(name, quantization="none")
    assert geometry.weight_bytes / 2e9 == pytest.approx(parameters_billion, rel=0.001)
    assert len(geometry.layers) == n_layers
    assert {layer.num_experts for layer in geometry.layers} == {num_experts}


def test_quantization_shrinks_experts_only() -> None:
    plain = load_geometry("deepseek-v3", quantization="none")
    int4 = load_geometry("deepseek-v3", quantization="int4")
    assert int4.router_bytes == plain.router_bytes
    assert int4.expert_bytes == pytest.approx(plain.expert_bytes * 0.5625 / 2)


def test_latent_attention_keeps_a_small_cache() -> None:
    assert load_geometry("deepseek-v3", quantization="none").kv_token_bytes == 2 * 61 * (512 + 64)
    assert load_geometry("qwen3-235b", quantization="none").kv_token_bytes == 2 * 94 * 2 * 4 * 128


def test_reads_a_config_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(dict(PUBLISHED["kimi-k2"])))
    geometry = load_geometry(str(tmp_path), quantization="none")
    assert geometry.name == tmp_path.name
    assert geometry.weight_bytes == load_geometry("kimi-k2", quantization="none").weight_bytes


def test_names_what_is_missing_in_a_config() -> None:
    config = {k: v for k, v in PUBLISHED["kimi-k2"].items() if k != "n_routed_experts"}
    with pytest.raises(SimulationError, match=r"config\.json num_experts: .*positive integer"):
        from_config(config, name="kimi", quantization="none")


def test_names_the_known_models() -> None:
    with pytest.raises(SimulationError, match="--geometry: got 'gpt-5', expected qwen3-235b"):
        load_geometry("gpt-5", quantization="none")
