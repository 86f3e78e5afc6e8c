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

from faasmoe_expert.functions.kernels import RoutedPairs, index_tensor
from faasmoe_expert.functions.weights import LayerWeights
from faasmoe_expert.lazy_import import META_REGISTRATIONS, load_deferred


def build_meta_model(model_dir: Path, architecture: str) -> nn.Module:
    """Return the family's model on the meta device, with its own experts forward.

    Args:
        model_dir: folder with config.json.
        architecture: class name in transformers.
    """
    load_deferred(META_REGISTRATIONS)
    import transformers

    config = transformers.AutoConfig.from_pretrained(model_dir)
    with torch.device("meta"):
        model = getattr(transformers, architecture)._from_config(
            config, experts_implementation="eager"
        )
    return model.eval()  # type: ignore[no-any-return]


@functools.lru_cache(maxsize=2)
def _cached_meta_model(model_dir: Path, architecture: str) -> nn.Module:
    return build_meta_model(model_dir, architecture)


class TransformersKernel:
    """Computes pairs through the family's own experts module.

    Every pair becomes a call's row of its own, `(hidden [P, H], index [P, 1], weights [P, 1])`, so
    that the module needs no notion of a block or of experts that are elsewhere.
    """

    def __init__(self, module: nn.Module, weights: LayerWeights, experts: Sequence[int]) -> None:
        self._local_index = {expert: expert for expert in experts}
        parameters: dict[str, Tensor] = dict(weights.shared)
        for name, stack in weights.stacked.items():
            if isinstance(stack, Tensor):
                parameters[name] = stack
            else:  # a copy of the block's experts: the module sees only those, renumbered
                parameters[name] = stack.tensor
                self._local_index = dict(stack.position)
                module.num_experts = len(experts)  # type: ignore[assignment]
        for name, value in parameters.items():
            _set_parameter(module, name, value)
        self._module = module

    @classmethod
    def from_store(
        cls,
        model_dir: Path,
        architecture: str,
        name: str,
        weights: LayerWeights,
        experts: Sequence[int],
    ) -> TransformersKernel:
        """Lay `weights` under a copy of the module `name` of the family's model."""
        import copy

        module = copy.deepcopy(_cached_meta_model(model_dir, architecture).get_submodule(name))
        return cls(module, weights, experts)

    @torch.inference_mode()
    def compute_per_pair(self, hidden: Tensor, pairs: RoutedPairs) -> Tensor:
        """Return each pair's weighted output, tile by tile, [P, H]; see run_gated."""
        out = hidden.new_empty(len(pairs), hidden.shape[1])  # [P, H]
        for expert, index, rows in pairs.tiles(hidden):
            weight = pairs.weight.new_zeros(len(rows), 1)  # [8, 1]
            weight[: len(index), 0] = pairs.weight[index]
            experts = torch.full((len(rows), 1), self._local_index[expert], device=hidden.device)
            out[index] = self._module(rows, experts, weight)[: len(index)].to(out.dtype)
        return out

    @torch.inference_mode()
    def compute_reduced(self, hidden: Tensor, pairs: RoutedPairs) -> Tensor:
        """Return the weighted sum of each row's experts, [T, H]; see sum_gated."""
        row = index_tensor(pairs.row, hidden.device)  # [P]
        local = np.array([self._local_index[int(e)] for e in pairs.expert])
        expert = index_tensor(local, hidden.device)[:, None]  # [P, 1]
        outputs = self._module(hidden[row], expert, pairs.weight[:, None])  # [P, H]
        total = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)  # [T, H]
        for _, positions in pairs.by_expert():
            index = index_tensor(positions, hidden.device)  # [n]
            total.index_add_(0, row[index], outputs[index].float())
        return total.to(hidden.dtype)


def _set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    owner_name, _, leaf = name.rpartition(".")
    owner: Any = module.get_submodule(owner_name)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[leaf] = value
