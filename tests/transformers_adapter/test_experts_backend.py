"""The experts implementation: overlapping of shared experts, deferred tensors."""

import inspect
from collections.abc import Callable

import pytest
import torch
from families.inputs import prompts
from families.registry import FAMILIES, Family, experts_modules, forward_logits
from torch import Tensor, nn

from faasmoe_transformers.experts_backend import (
    EXPERTS_IMPLEMENTATION,
    DeferredTensor,
    OverlappedSharedExpert,
    bind_experts,
    register_implementation,
)

Work = Callable[[], None]
SHARED = [
    f
    for f in FAMILIES
    if f.name in ("qwen2_moe", "deepseek_v3", "hunyuan_v1_moe", "aria", "ernie4_5_moe", "glm4_moe")
]


class InProcess:
    """Computes a layer with the family's own module and records what is computed while it waits."""

    def __init__(self, model: nn.Module, calls: list[str]) -> None:
        self._modules = list(experts_modules(model).values())
        self._calls = calls
        self.overlapped: list[bool] = []

    def compute(
        self,
        layer: int,
        hidden: Tensor,
        index: Tensor,
        weight: Tensor,
        *,
        while_waiting: Work = lambda: None,
    ) -> Tensor:
        computed = len(self._calls)
        while_waiting()
        self.overlapped.append(len(self._calls) > computed)
        module = self._modules[layer]
        family_forward: Callable[..., Tensor] = inspect.unwrap(type(module).forward)
        return family_forward(module, hidden, index, weight)  # [T, H]


@pytest.mark.parametrize("family", SHARED, ids=lambda family: family.name)
def test_shared_experts_are_overlapped_and_bit_identical(family: Family) -> None:
    model = family.build()
    expected = forward_logits(family, model, prompts())
    calls: list[str] = []
    dispatcher = InProcess(model, calls)
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ("shared_expert", "shared_experts", "shared_mlp"):
            module.down_proj.register_forward_hook(lambda *_, name=name: calls.append(name))
    register_implementation()
    bind_experts(model, list(experts_modules(model)), dispatcher)
    model.set_experts_implementation(EXPERTS_IMPLEMENTATION)
    first = forward_logits(family, model, prompts())
    n_layers = len(dispatcher.overlapped)
    second = forward_logits(family, model, prompts())
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)
    assert all(dispatcher.overlapped[n_layers:])  # from the second pass on, in either order
    assert len(calls) == 2 * n_layers  # each computed once


def test_deferred_tensor_is_computed_once_on_first_use() -> None:
    computed: list[int] = []

    def compute() -> Tensor:
        computed.append(1)
        return torch.arange(6.0).view(2, 3)

    deferred = DeferredTensor(compute)
    assert not computed
    assert deferred.shape == (2, 3)
    assert torch.equal(torch.sigmoid(deferred) * deferred, torch.sigmoid(compute()) * compute())
    assert len(computed) == 3  # once by the deferred tensor, twice by the line above


def test_modified_rows_are_computed_again() -> None:
    module = nn.Linear(4, 4, bias=False).requires_grad_(False)
    shared = OverlappedSharedExpert(module)
    rows = torch.randn(3, 4)  # [T, H]
    for _ in range(2):  # the first pass shows that the block calls it after the experts
        shared.compute_while_waiting(rows)
        module(rows)
    shared.compute_while_waiting(rows)
    rows += 1
    assert torch.equal(module(rows) + 0, rows @ module.weight.T)
