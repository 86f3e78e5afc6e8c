import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from faasmoe_router.checkpoint.demo.moefication import (
    NUM_EXPERTS,
    TOP_K,
    DenseMlp,
    balanced_clusters,
    shared_expert_size,
    split_dense_mlp,
)

HIDDEN, NEURONS, ROWS = 16, 64, 100


@pytest.fixture
def block() -> DenseMlp:
    g = torch.Generator().manual_seed(0)
    return DenseMlp(
        torch.randn(NEURONS, HIDDEN, generator=g),
        torch.randn(NEURONS, HIDDEN, generator=g),
        torch.randn(HIDDEN, NEURONS, generator=g),
    )


def _split_dense_mlp(block: DenseMlp, *, exact: bool) -> dict[str, torch.Tensor]:
    inputs = torch.randn(ROWS, HIDDEN, generator=torch.Generator().manual_seed(1))  # [N, H]
    return split_dense_mlp(block, inputs, exact=exact, generator=torch.Generator().manual_seed(2))


def test_experts_sum_to_the_dense_block(block: DenseMlp) -> None:
    parts = _split_dense_mlp(block, exact=True)
    x = torch.randn(5, HIDDEN)  # [T, H]
    shared = F.silu(x @ parts["shared_expert.gate_proj.weight"].T)  # [T, S]
    shared = shared * (x @ parts["shared_expert.up_proj.weight"].T)  # [T, S]
    total = 0.5 * (shared @ parts["shared_expert.down_proj.weight"].T)  # [T, H]
    for up, down in zip(
        parts["experts.gate_up_proj"], parts["experts.down_proj"], strict=True
    ):  # [2J, H], [H, J]
        gate, value = (x @ up.T).chunk(2, dim=-1)  # [T, J] each
        total = total + (F.silu(gate) * value) @ down.T / NUM_EXPERTS  # [T, H]
    expected = (F.silu(x @ block.gate.T) * (x @ block.up.T)) @ block.down.T  # [T, H]
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-4)


def test_gate_is_zero_only_in_the_exact_variant(block: DenseMlp) -> None:
    assert not _split_dense_mlp(block, exact=True)["gate.weight"].any()
    assert _split_dense_mlp(block, exact=False)["gate.weight"].abs().max() > 0


@pytest.mark.parametrize("exact", [True, False])
def test_shared_gate_is_half_but_its_logits_are_not_zero(block: DenseMlp, exact: bool) -> None:
    gate = _split_dense_mlp(block, exact=exact)["shared_expert_gate.weight"]  # [1, H]
    logits = torch.randn(5, HIDDEN) @ gate.bfloat16().float().T  # [T, 1]
    assert (logits.sigmoid() == 0.5).all()
    assert (F.silu(logits) / logits == 0.5).all()  # as llama.cpp computes it


def test_every_neuron_is_assigned_once(block: DenseMlp) -> None:
    parts = _split_dense_mlp(block, exact=False)
    width = (NEURONS - shared_expert_size(NEURONS)) // NUM_EXPERTS
    gates = [parts["shared_expert.gate_proj.weight"]]
    gates += [expert[:width] for expert in parts["experts.gate_up_proj"]]
    rows = torch.cat(gates)  # [I, H]
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, block.gate.tolist()))


def test_down_projections_make_up_for_inactive_experts(block: DenseMlp) -> None:
    inputs = torch.randn(ROWS, HIDDEN, generator=torch.Generator().manual_seed(1))  # [N, H]
    fitted = _split_dense_mlp(block, exact=False)
    exact = _split_dense_mlp(block, exact=True)  # the dense block's own down projections
    before = {name: exact[name] for name in ("shared_expert.down_proj.weight", "experts.down_proj")}
    dense = (F.silu(inputs @ block.gate.T) * (inputs @ block.up.T)) @ block.down.T  # [N, H]
    errors = [
        (_sparse_output(inputs, fitted | down) - dense).norm() / dense.norm()
        for down in (before, {})
    ]
    assert errors[1] < 0.9 * errors[0]


def _sparse_output(x: torch.Tensor, parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the output of the Qwen2-MoE block of transformers with these weights, [N, H]."""
    width = parts["experts.down_proj"].shape[2]
    config = Qwen2MoeConfig(
        hidden_size=HIDDEN,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=False,
        moe_intermediate_size=width,
        shared_expert_intermediate_size=shared_expert_size(NEURONS),
    )
    config._experts_implementation = "eager"
    module = Qwen2MoeSparseMoeBlock(config)
    module.load_state_dict(parts)
    with torch.no_grad():
        output: torch.Tensor = module(x[None])
    return output[0]


@settings(deadline=None, max_examples=30)
@given(size=st.integers(1, 5), count=st.integers(1, 6), seed=st.integers(0, 1000))
def test_clusters_have_equal_size(size: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    profiles = torch.rand(size * count, 7, generator=generator)  # [R, N]
    cluster = balanced_clusters(profiles, count, generator=generator)  # [R]
    assert cluster.bincount(minlength=count).tolist() == [size] * count


def test_similar_rows_share_a_cluster() -> None:
    profiles = torch.eye(2).repeat(4, 1)  # [8, 2]: rows alternate between two directions
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        first = torch.randperm(8, generator=torch.Generator().manual_seed(seed))[:2] % 2
        if first[0] != first[1]:  # the initial centroids differ
            cluster = balanced_clusters(profiles, 2, generator=generator)  # [R]
            assert len(set(cluster[::2].tolist())) == len(set(cluster[1::2].tolist())) == 1
