"""Where a model's tensors belong, and in which dtype it computes with them.

Follows from the family's class and the config, not from weights, so a zygote finds it out for all
routers of equal models: 20 ms for 30 layers, which each of them would take of a processor.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from faasmoe_transformers.dtypes import ParameterDtypes
from faasmoe_transformers.native_linear import stored_weight_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TensorPlaces:
    """The parameters and buffers of a model without weights.

    Args:
        model: the model, with parameters on the meta device.
        dtype: the dtype that it computes in.

    Attributes:
        stored_weights: names of the weights that may keep the store's dtype in a float32 model.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        dtypes = ParameterDtypes(model, dtype)
        expected = model.state_dict()
        modules = dict(model.named_modules(remove_duplicate=False))
        self.stored_weights = stored_weight_names(model)
        self._dtypes = {name: dtypes.dtype_of(name, tensor) for name, tensor in expected.items()}
        self._places: dict[str, tuple[nn.Module, str]] = {}
        for name in expected:
            prefix, _, attribute = name.rpartition(".")
            self._places[name] = modules[prefix], attribute
        self._model = model
        self._loads_plainly = not any(map(_has_own_loading, modules.values()))

    def converted(self, name: str, tensor: Tensor, *, kept: Collection[str]) -> Tensor:
        """Return a stored tensor in the dtype to compute with, unless its name is in `kept`."""
        dtype = self._dtypes.get(name)
        if dtype is None or name in kept or not tensor.is_floating_point():
            return tensor
        return tensor.to(dtype)

    def assign(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Put tensors in their places without copying them; return the names that have none.

        Raises:
            ValueError: tensors have other shapes than the model's.
        """
        if not self._loads_plainly:
            return self._load(tensors)
        for name, tensor in tensors.items():
            if name not in self._places:
                continue
            module, attribute = self._places[name]
            current: Tensor = getattr(module, attribute)
            if current.shape != tensor.shape:
                got, expected = tuple(tensor.shape), tuple(current.shape)
                raise ValueError(f"size mismatch for {name}: got {got}, expected {expected}")
            is_parameter = isinstance(current, nn.Parameter)
            value = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
            setattr(module, attribute, value)
        return [name for name in tensors if name not in self._places]

    def _load(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """As `assign`, for families that take part in loading."""
        try:
            incompatible_keys = self._model.load_state_dict(tensors, strict=False, assign=True)
        except RuntimeError as error:
            raise ValueError(str(error)) from error
        return list(incompatible_keys.unexpected_keys)

    def unassigned(self, assigned: Collection[str]) -> Iterator[str]:
        """Yield the names of parameters and buffers that have no tensor yet.

        A parameter without one is still on the meta device; a buffer never is.

        Args:
            assigned: names of the tensors that were assigned.
        """
        for name, (module, attribute) in self._places.items():
            if name in assigned:
                continue
            parameter = dict(module.named_parameters(recurse=False)).get(attribute)
            is_buffer = attribute in dict(module.named_buffers(recurse=False))
            if is_buffer or (parameter is not None and parameter.is_meta):
                yield name


def _has_own_loading(module: nn.Module) -> bool:
    """Return whether a module does anything of its own when tensors are loaded."""
    return bool(
        module._load_state_dict_pre_hooks
        or module._load_state_dict_post_hooks
        or type(module)._load_from_state_dict is not nn.Module._load_from_state_dict
    )
