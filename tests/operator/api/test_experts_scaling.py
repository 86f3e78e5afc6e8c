from typing import Any

import pytest

from faasmoe_operator.api.v1alpha1.experts import ScalingSpec
from faasmoe_operator.api.v1alpha1.field_types import parse_index_ranges


def scaling(**values: Any) -> ScalingSpec:
    return ScalingSpec.model_validate(values)


@pytest.mark.parametrize(
    ("text", "indices"),
    [("3", {3}), ("0-2", {0, 1, 2}), ("0-1,7", {0, 1, 7}), ("4-4,4", {4})],
)
def test_parses_index_ranges(text: str, indices: set[int]) -> None:
    assert parse_index_ranges(text) == indices


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "1,,2", "5-3", "1 2", "0\n", "12345"])
def test_rejects_invalid_index_ranges(text: str) -> None:
    with pytest.raises(ValueError, match=r"indices|ascending"):
        parse_index_ranges(text)


def test_override_applies_to_matching_functions_only() -> None:
    settings = scaling(overrides=[{"layers": "0-3", "experts": "0", "minScale": 1}])
    assert settings.for_function((2,), (0, 1)).min_scale == 1
    assert settings.for_function((4,), (0, 1)).min_scale == 0
    assert settings.for_function((2,), (5, 6)).min_scale == 0


def test_last_override_wins_and_keeps_omitted_settings() -> None:
    first = {"layers": "0", "minScale": 1, "target": 9}
    last = {"experts": "0-7", "minScale": 2}
    settings = scaling(overrides=[first, last]).for_function((0,), (0,))
    assert (settings.min_scale, settings.target, settings.max_scale) == (2, 9, 8)
