"""The general path: a family's own experts module, with its parameters laid over the store's mmap.

Used where the lean kernel does not apply. Imports transformers, and so only when it is needed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from faasmoe_expert.deferral import META_KERNELS, make_deferred
from faasmoe_expert.functions.pairs import Pairs, as_index
from faasmoe_expert.functions.weights import LayerWeights


def build_on_meta(model_dir: Path, architecture: str) -> nn.Module:
    """Return the family's model on the meta device, with its own experts forward.

    Args:
        model_dir: folder with config.json.
        architecture: class name in transformers.
    """
    make_deferred(META_KERNELS)
    import transformers

    config = transformers.AutoConfig.from_pretrained(model_dir)
    with torch.device("meta"):
        model = getattr(transformers, architecture)._from_config(
            config, experts_implementation="eager"
        )
    return model.eval()  # type: ignore[no-any-return]


@functools.lru_cache(maxsize=2)
def _cached_on_meta(model_dir: Path, architecture: str) -> nn.Module:
    return build_on_meta(model_dir, architecture)


class ModuleKernel:
    """Computes pairs through the family's own experts module.

    Every pair becomes a call's row of its own, `(hidden [P, H], index [P, 1], weights [P, 1])`, so
    that the module needs no notion of a block or of experts that are elsewhere.
    """

    def __init__(self, module: nn.Module, weights: LayerWeights, experts: Sequence[int]) -> None:
        self._local = {expert: expert for expert in experts}
        parameters: dict[str, Tensor] = dict(weights.shared)
        for name, stack in weights.stacked.items():
            if isinstance(stack, Tensor):
                parameters[name] = stack
            else:  # a copy of the block's experts: the module sees only those, renumbered
                parameters[name] = stack.tensor
                self._local = dict(stack.position)
                module.num_experts = len(experts)  # type: ignore[assignment]
        for name, value in parameters.items():
            _put(module, name, value)
        self._module = module

    @classmethod
    def from_store(
        cls,
        model_dir: Path,
        architecture: str,
        name: str,
        weights: LayerWeights,
        experts: Sequence[int],
    ) -> ModuleKernel:
        """Lay `weights` under a copy of the module `name` of the family's model."""
        import copy

        module = copy.deepcopy(_cached_on_meta(model_dir, architecture).get_submodule(name))
        return cls(module, weights, experts)

    @torch.inference_mode()
    def run(self, hidden: Tensor, pairs: Pairs) -> Tensor:
        """Return each pair's weighted output, tile by tile, [P, H]; see run_gated."""
        out = hidden.new_empty(len(pairs), hidden.shape[1])  # [P, H]
        for expert, index, rows in pairs.tiles(hidden):
            weight = pairs.weight.new_zeros(len(rows), 1)  # [8, 1]
            weight[: len(index), 0] = pairs.weight[index]
            experts = torch.full((len(rows), 1), self._local[expert], device=hidden.device)
            out[index] = self._module(rows, experts, weight)[: len(index)].to(out.dtype)
        return out

    @torch.inference_mode()
    def sum(self, hidden: Tensor, pairs: Pairs) -> Tensor:
        """Return the weighted sum of each row's experts, [T, H]; see sum_gated."""
        row = as_index(pairs.row, hidden.device)  # [P]
        local = np.array([self._local[int(e)] for e in pairs.expert])
        expert = as_index(local, hidden.device)[:, None]  # [P, 1]
        each = self._module(hidden[row], expert, pairs.weight[:, None])  # [P, H]
        total = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)  # [T, H]
        for _, positions in pairs.by_expert():
            index = as_index(positions, hidden.device)  # [n]
            total.index_add_(0, row[index], each[index].float())
        return total.to(hidden.dtype)


def _put(module: nn.Module, name: str, value: Tensor) -> None:
    owner_name, _, leaf = name.rpartition(".")
    owner: Any = module.get_submodule(owner_name)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[leaf] = value
