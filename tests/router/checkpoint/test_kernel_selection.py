"""Selection of the lean kernel by comparison with the family's own forward."""

import resource
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from faasmoe_router.checkpoint.kernel_selection import (
    candidate_kernels,
    is_equivalent,
    select_kernel,
)
from faasmoe_transformers.model_skeleton import find_experts_modules

TinyModel = Callable[..., Any]

GATED = {
    "name": "gated",
    "activation": "silu",
    "transposed": False,
    "interleaved": False,
    "bias": False,
}


def _experts(**config: Any) -> Any:
    with torch.device("meta"):
        return MixtralExperts(MixtralConfig(**config))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2"])
def test_selects_the_activation_of_the_config(activation: str, tiny_model: TinyModel) -> None:
    model = tiny_model("mixtral", hidden_act=activation)
    (first, _) = find_experts_modules(model)
    assert select_kernel(first) == {**GATED, "activation": activation}


def test_selects_the_clamped_activation_with_its_parameters(tiny_model: TinyModel) -> None:
    (first, _) = find_experts_modules(tiny_model("gpt_oss"))
    assert select_kernel(first) == {
        "name": "gated",
        "activation": "clamped_swiglu",
        "transposed": True,
        "interleaved": True,
        "bias": True,
        "alpha": 1.702,
        "limit": 7.0,
    }


@pytest.mark.parametrize("change", [{"alpha": 1.5}, {"limit": 6.0}])
def test_other_parameters_of_the_clamped_activation_are_not_equivalent(
    tiny_model: TinyModel, change: dict[str, float]
) -> None:
    (first, _) = find_experts_modules(tiny_model("gpt_oss"))
    (spec, *_) = candidate_kernels(first.module)
    assert is_equivalent(first.module, spec)
    assert not is_equivalent(first.module, spec | change)


def test_form_without_equivalent_kernel_selects_none(tiny_model: TinyModel) -> None:
    (first, _) = find_experts_modules(tiny_model("gpt_oss"))
    del first.module.alpha  # so that its activation is not recognised
    assert list(candidate_kernels(first.module))
    assert select_kernel(first) is None


@pytest.mark.parametrize(
    "change", [{"activation": "gelu"}, {"interleaved": True}, {"transposed": True}, {"bias": True}]
)
def test_wrong_kernel_is_not_equivalent(change: dict[str, Any]) -> None:
    assert is_equivalent(_experts(), GATED)
    assert not is_equivalent(_experts(), GATED | change)


def test_gate_that_differs_only_for_large_values_is_not_equivalent() -> None:
    class Clamped(MixtralExperts):  # type: ignore[misc]
        def _apply_gate(self, both: torch.Tensor) -> torch.Tensor:
            gate, up = both.chunk(2, dim=-1)
            return self.act_fn(gate.clamp(max=10)) * up  # type: ignore[no-any-return]

        def forward(self, hidden: Any, index: Any, weights: Any) -> Any:
            from transformers.integrations.moe import batched_mm_experts_forward

            return batched_mm_experts_forward(self, hidden, index, weights)

    with torch.device("meta"):
        module = Clamped(MixtralConfig())
    assert not is_equivalent(module, GATED)


def test_additional_parameters_exclude_the_lean_kernel() -> None:
    module = _experts()
    module.scale = torch.nn.Parameter(torch.ones(8))
    assert list(candidate_kernels(module)) == []


def test_equivalence_test_of_a_huge_module_takes_no_memory() -> None:
    module = _experts(hidden_size=16384, intermediate_size=65536, num_local_experts=512)
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert is_equivalent(module, GATED)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < 64 << 10
    assert module.gate_up_proj.shape == (512, 131072, 16384)
