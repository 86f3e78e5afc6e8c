"""The general kernel: a family's own experts module, with the store's tensors as its parameters.

Used where the lean kernel does not apply. transformers is imported when the first such module is
built.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from faasmoe_expert.functions.kernels import RoutedPairs, index_tensor
from faasmoe_expert.functions.stacks import QuantizedStack, ScatteredStack
from faasmoe_expert.functions.weights import LayerWeights
from faasmoe_transformers.meta_model import copy_experts_module, replace_tensor, set_num_experts


class TransformersKernel:
    """Computes pairs through the family's own experts module.

    Every pair is passed as a row of its own, `(hidden [P, H], index [P, 1], weights [P, 1])`, so
    that the module need not know that some experts are elsewhere.

    Args:
        module: a new experts module on the meta device.
        weights: the layer's expert parameters, mapped or copied.
        experts: global indices of the block's experts.
    """

    name = "transformers"

    def __init__(self, module: Any, weights: LayerWeights, experts: Sequence[int]) -> None:
        self._local_index = {expert: expert for expert in experts}
        parameters: dict[str, Tensor] = dict(weights.shared)
        for name, stack in weights.stacked.items():
            if isinstance(stack, Tensor):
                parameters[name] = stack
            elif isinstance(stack, QuantizedStack):
                raise TypeError(f"{name}: got codes, which QuantizedTransformersKernel computes")
            elif isinstance(stack, ScatteredStack):
                raise TypeError(f"{name}: got experts in several places, expected one tensor")
            else:  # a copy of the block's experts: the module has only those, renumbered
                parameters[name] = stack.tensor
                self._local_index = dict(stack.position)
                set_num_experts(module, len(experts))
        for name, value in parameters.items():
            replace_tensor(module, name, value)
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
        """Build the kernel of the experts module `name` of a store's model.

        Args:
            model_dir: folder with config.json.
            architecture: name of the model's class in transformers.
            name: name of the module in the model.
            weights: the layer's expert parameters.
            experts: global indices of the block's experts.
        """
        return cls(copy_experts_module(model_dir, architecture, name), weights, experts)

    @torch.inference_mode()
    def compute_per_pair(self, hidden: Tensor, pairs: RoutedPairs) -> Tensor:
        """Return each pair's weighted output, tile by tile, [P, H]; see gated_per_pair."""
        out = hidden.new_empty(len(pairs), hidden.shape[1])  # [P, H]
        for expert, index, rows in pairs.tiles(hidden):
            weight = pairs.weight.new_zeros(len(rows), 1)  # [8, 1]
            weight[: len(index), 0] = pairs.weight[index]
            experts = torch.full((len(rows), 1), self._local_index[expert], device=hidden.device)
            out[index] = self._module(rows, experts, weight)[: len(index)].to(out.dtype)
        return out

    @torch.inference_mode()
    def compute_reduced(self, hidden: Tensor, pairs: RoutedPairs) -> Tensor:
        """Return the weighted sum of each row's experts, float32 [T, H]; see gated_reduced."""
        row = index_tensor(pairs.row, hidden.device)  # [P]
        local = np.array([self._local_index[int(e)] for e in pairs.expert])
        expert = index_tensor(local, hidden.device)[:, None]  # [P, 1]
        outputs = self._module(hidden[row], expert, pairs.weight[:, None])  # [P, H]
        total = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)  # [T, H]
        for _, positions in pairs.by_expert():
            index = index_tensor(positions, hidden.device)  # [n]
            total.index_add_(0, row[index], outputs[index].float())
        return total


class QuantizedTransformersKernel:
    """Computes pairs through the family's module over codes and scales, in float32.

    The module holds one expert, whose parameters are dequantised anew for each call: slow, but
    nothing of the function is held in another form than in the store.

    Args:
        module: a new experts module on the meta device.
        weights: the layer's mapped expert parameters.
    """

    name = "transformers (dequantises on use)"

    def __init__(self, module: Any, weights: LayerWeights) -> None:
        self._module = module
        self._stacks = weights.stacked
        self._lock = Lock()  # the module's parameters are those of the expert being computed
        set_num_experts(module, 1)
        for name, value in weights.shared.items():
            replace_tensor(module, name, value.float() if value.is_floating_point() else value)

    @torch.inference_mode()
    def compute_per_pair(self, hidden: Tensor, pairs: RoutedPairs) -> Tensor:
        """Return each pair's weighted output, tile by tile, [P, H]; see gated_per_pair."""
        out = hidden.new_empty(len(pairs), hidden.shape[1])  # [P, H]
        with self._lock:
            loaded = -1
            for expert, index, rows in pairs.tiles(hidden.float()):
                if expert != loaded:
                    self._load(expert)
                    loaded = expert
                weight = pairs.weight.new_zeros(len(rows), 1)  # [8, 1]
                weight[: len(index), 0] = pairs.weight[index]
                out[index] = self._compute(rows, weight)[: len(index)].to(out.dtype)
        return out

    @torch.inference_mode()
    def compute_reduced(self, hidden: Tensor, pairs: RoutedPairs) -> Tensor:
        """Return the weighted sum of each row's experts, float32 [T, H]; see gated_reduced."""
        total = torch.zeros(hidden.shape, dtype=torch.float32)  # [T, H]
        rows = hidden.float()
        with self._lock:
            for expert, positions in pairs.by_expert():
                self._load(expert)
                index = index_tensor(pairs.row[positions], hidden.device)  # [n]
                weight = pairs.weight[index_tensor(positions, hidden.device), None]  # [n, 1]
                total.index_add_(0, index, self._compute(rows[index], weight))
        return total

    def _load(self, expert: int) -> None:
        for name, stack in self._stacks.items():
            replace_tensor(self._module, name, stack[expert].float()[None])

    def _compute(self, rows: Tensor, weight: Tensor) -> Tensor:
        """Return the outputs [n, H] of the loaded expert for rows [n, H] and weights [n, 1]."""
        experts = torch.zeros((len(rows), 1), dtype=torch.int64)  # [n, 1]
        output: Tensor = self._module(rows, experts, weight)
        return output
