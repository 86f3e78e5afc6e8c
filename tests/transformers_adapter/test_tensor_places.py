"""Tensors are put in their places as `load_state_dict` would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from faasmoe_transformers.tensor_places import TensorPlaces


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, device="meta"))
        self.register_buffer("steps", torch.zeros(1))
        self.register_buffer("computed", torch.ones(2), persistent=False)


class Model(nn.Module):
    """A model of which transformers would keep the norm in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3, device="meta")
        self.norm = Norm()
        self.again = self.first  # under two names

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        return {"norm": torch.float32}


class HalvingLinear(nn.Linear):
    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        state_dict[f"{prefix}weight"] = state_dict[f"{prefix}weight"] / 2
        super()._load_from_state_dict(state_dict, prefix, *rest)


def places_of(model: Any) -> TensorPlaces:
    return TensorPlaces(model.eval().requires_grad_(False), torch.bfloat16)


def tensors() -> dict[str, Tensor]:
    return {
        "first.weight": torch.arange(12.0).reshape(3, 4),
        "first.bias": torch.ones(3),
        "norm.weight": torch.full((4,), 2.0),
        "norm.steps": torch.tensor([7.0]),
    }


def test_tensors_are_assigned_without_copies() -> None:
    model, given = Model(), tensors()
    places = places_of(model)
    assert places.assign({**given, "other": torch.zeros(1)}) == ["other"]
    assert model.first.weight.data_ptr() == given["first.weight"].data_ptr()
    assert not model.first.weight.requires_grad
    assert isinstance(model.norm.weight, nn.Parameter)
    assert model.norm.steps is given["norm.steps"]
    assert model.again.bias is model.first.bias
    assert list(places.unassigned(given)) == []


def test_names_what_has_no_tensor() -> None:
    model = Model()
    given = {"first.weight": torch.zeros(3, 4), "norm.weight": torch.zeros(4)}
    places = places_of(model)
    places.assign(given)
    assert set(places.unassigned(given)) == {"first.bias", "again.bias", "norm.steps"}


def test_a_weight_that_was_removed_from_the_model_needs_no_tensor() -> None:
    model = Model()
    places = places_of(model)
    given = {name: tensor for name, tensor in tensors().items() if name != "first.weight"}
    places.assign(given)
    del model.first.weight
    assert list(places.unassigned(given)) == []


@pytest.mark.parametrize("model_type", [nn.Linear, HalvingLinear], ids=["plain", "own loading"])
def test_a_tensor_of_another_shape_is_refused(model_type: type[nn.Linear]) -> None:
    model = Model()
    model.first = model_type(4, 3, device="meta")
    with pytest.raises(ValueError, match=r"first\.weight"):
        places_of(model).assign({**tensors(), "first.weight": torch.zeros(4, 3)})


def test_a_family_that_takes_part_in_loading_is_let() -> None:
    model = Model()
    model.first = model.again = HalvingLinear(4, 3, device="meta")
    places = places_of(model)
    given = {**tensors(), "again.weight": torch.zeros(3, 4), "again.bias": torch.zeros(3)}
    assert places.assign({**given, "other": torch.zeros(1)}) == ["other"]
    assert not model.first.weight.is_meta
    model.first, model.again = HalvingLinear(4, 3, device="meta"), nn.Linear(4, 3, device="meta")
    places_of(model).assign(given)
    assert torch.equal(model.first.weight, given["first.weight"] / 2)


def test_tensors_are_converted_to_the_dtype_to_compute_in() -> None:
    model = Model().to(torch.bfloat16)
    places, given = places_of(model), tensors()
    converted = {n: places.converted(n, t, kept={"first.bias"}) for n, t in given.items()}
    assert converted["first.weight"].dtype is torch.bfloat16
    assert converted["first.bias"] is given["first.bias"]
    assert converted["norm.weight"].dtype is torch.float32
    assert places.converted("other", given["first.bias"], kept=()) is given["first.bias"]
    codes = torch.zeros(2, dtype=torch.int8)
    assert places.converted("first.weight", codes, kept=()) is codes
    assert places.stored_weights == {"first.weight"}
