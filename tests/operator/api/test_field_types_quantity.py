from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kubernetes.utils.quantity import parse_quantity as kubernetes_parse_quantity

from faasmoe_operator.api.v1alpha1.field_types import parse_quantity, quantity_to_bytes


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4", 4),
        ("500m", Fraction(1, 2)),
        ("1.5Gi", 3 << 29),
        ("100Gi", 100 << 30),
        ("2e9", 2_000_000_000),
        ("2E-1", Fraction(1, 5)),
        ("2E", 2 * 10**18),
        ("2Ei", 2 << 60),
        (".5k", 500),
        ("1.", 1),
        ("7n", Fraction(7, 10**9)),
    ],
)
def test_parses_quantities(text: str, value: Fraction) -> None:
    assert parse_quantity(text) == value


@pytest.mark.parametrize(
    "text", ["", "Gi", "-1", "+1", "1 Gi", "1GB", "1e", "1e999", "1\n", "0" * 33]
)
def test_rejects_invalid_quantities(text: str) -> None:
    with pytest.raises(ValueError, match="a quantity such as"):
        parse_quantity(text)


def test_rounds_fractional_bytes_up() -> None:
    assert [quantity_to_bytes(text) for text in ("1m", "1500m", "0.5Ki")] == [1, 2, 512]


suffixes = ["", "m", "k", "M", "G", "T", "Ki", "Mi", "Gi", "Ti", "Pi"]


@given(st.decimals(0, 10**6, places=3), st.sampled_from(suffixes))
def test_agrees_with_the_kubernetes_client(number: object, suffix: str) -> None:
    text = f"{number}{suffix}"
    assert parse_quantity(text) == Fraction(kubernetes_parse_quantity(text))
