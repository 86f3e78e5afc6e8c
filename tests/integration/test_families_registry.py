"""The registry covers every family of the experts interface with representative tiny models.

It also checks what dispatch relies on for each family: the arguments of experts modules, the layout
of their parameters, and that work can be split by token-expert pairs and by blocks of experts.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from families.calls import RecordedCall, call_by_pairs, even_blocks, recorded_calls
from families.coverage import covered_families
from families.inputs import prompts
from families.registry import (
    FAMILIES,
    UNBUILDABLE,
    Family,
    experts_modules,
    forward_logits,
    tiny_config,
)
from families.shrink import EXPERTS
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

TOLERANCE = 1e-5
# Weights loaded from a file have another alignment, so that GEMMs round differently.
RELOAD_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class ModelSample:
    """A tiny model with the calls and logits of one forward pass."""

    family: Family
    model: PreTrainedModel
    calls: list[RecordedCall]
    logits: Tensor


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def sample(request: pytest.FixtureRequest) -> ModelSample:
    family: Family = request.param
    model = family.build()
    with recorded_calls(model) as calls:
        logits = forward_logits(family, model, prompts())
    return ModelSample(family, model, calls, logits)


def test_registry_lists_every_covered_family() -> None:
    listed = {family.name for family in FAMILIES} | set(UNBUILDABLE)
    assert listed == set(covered_families())


def test_models_use_the_decorated_experts_classes(sample: ModelSample) -> None:
    decorated = covered_families()[sample.family.name]
    used = {type(module).__name__ for module in experts_modules(sample.model).values()}
    assert used
    assert used <= set(decorated)


def test_build_is_deterministic(sample: ModelSample) -> None:
    again = sample.family.build().state_dict()
    first = sample.model.state_dict()
    assert first.keys() == again.keys()
    assert [name for name in first if not torch.equal(first[name], again[name])] == []


def test_logits_are_finite_and_depend_on_experts(sample: ModelSample) -> None:
    assert sample.logits.isfinite().all()
    without = sample.family.build()
    with torch.no_grad():
        for module in experts_modules(without).values():
            for parameter in module.parameters():
                parameter.zero_()
    change = (forward_logits(sample.family, without, prompts()) - sample.logits).abs().max()
    assert change > 1e-1


def test_sparse_layers_use_experts_of_every_block(sample: ModelSample) -> None:
    assert len({call.name for call in sample.calls}) >= 2
    for block in even_blocks(EXPERTS):
        hits = [torch.isin(call.args[1], torch.tensor(list(block))).any() for call in sample.calls]
        assert any(hits), block


def test_experts_are_called_with_flat_tokens_indices_and_weights(sample: ModelSample) -> None:
    for call in sample.calls:
        assert call.kwargs == {}
        hidden, top_k_index, top_k_weights = call.args  # [T, H], [T, k], [T, k]
        n_tokens, width = hidden.shape
        assert top_k_index.shape == top_k_weights.shape == (n_tokens, top_k_index.shape[-1])
        assert top_k_index.dtype == torch.int64
        assert 0 <= int(top_k_index.min()) <= int(top_k_index.max()) < EXPERTS
        assert call.output.shape == (n_tokens, width)
        assert call.output.dtype == hidden.dtype == top_k_weights.dtype == torch.float32


def test_parameters_are_stacked_over_experts_except_post_expert_norm(sample: ModelSample) -> None:
    for module in experts_modules(sample.model).values():
        shared = {
            name for name, parameter in module.named_parameters() if parameter.shape[0] != EXPERTS
        }
        assert module.num_experts == EXPERTS
        assert shared == ({"post_expert_norm.weight"} if module.has_post_expert_norm else set())
        assert list(module.buffers()) == []


def test_rows_of_pairs_sum_to_whole_call(sample: ModelSample) -> None:
    for call in sample.calls:
        torch.testing.assert_close(call_by_pairs(call), call.output, atol=TOLERANCE, rtol=TOLERANCE)


def test_partial_sums_of_blocks_sum_to_whole_call(sample: ModelSample) -> None:
    for call in sample.calls:
        partial_sums = [call_by_pairs(call, block) for block in even_blocks(EXPERTS)]  # 3 × [T, H]
        torch.testing.assert_close(
            torch.stack(partial_sums).sum(dim=0), call.output, atol=TOLERANCE, rtol=TOLERANCE
        )


def test_model_survives_save_and_load(sample: ModelSample, tmp_path: Path) -> None:
    sample.model.save_pretrained(tmp_path)
    loaded: PreTrainedModel = type(sample.model).from_pretrained(
        tmp_path, dtype=torch.float32, experts_implementation="eager"
    )
    saved_state, loaded_state = sample.model.state_dict(), loaded.state_dict()
    assert saved_state.keys() == loaded_state.keys()
    assert [n for n in saved_state if not torch.equal(saved_state[n], loaded_state[n])] == []
    logits = forward_logits(sample.family, loaded.eval(), prompts())
    torch.testing.assert_close(logits, sample.logits, atol=RELOAD_TOLERANCE, rtol=RELOAD_TOLERANCE)


def test_model_runs_with_remote_experts(
    sample: ModelSample, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = experts_modules(sample.model)
    router = _without_experts(sample)
    names = {module: name for name, module in experts_modules(router).items()}

    def remote(module: nn.Module, *args: Tensor) -> Tensor:
        output: Tensor = sources[names[module]](*args)
        return output

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, "remote", remote)
    router.set_experts_implementation("remote")
    assert torch.equal(forward_logits(sample.family, router, prompts()), sample.logits)


def _without_experts(sample: ModelSample) -> PreTrainedModel:
    """Return the model with only the parameters of its experts on the meta device."""
    with init_empty_weights(include_buffers=False):
        router: PreTrainedModel = type(sample.model)(tiny_config(sample.family.name))
    expert_parameters = {
        f"{name}.{local}"
        for name, module in experts_modules(router).items()
        for local, _ in module.named_parameters()
    }
    state = {
        name: tensor.clone()
        for name, tensor in sample.model.state_dict().items()
        if name not in expert_parameters
    }
    missing, unexpected = router.load_state_dict(state, strict=False, assign=True)
    router.tie_weights()
    assert set(missing) <= expert_parameters
    assert unexpected == []
    assert {n for n, p in router.named_parameters() if p.is_meta} <= expert_parameters
    return router.eval()
