from __future__ import annotations

import pytest

from faasmoe_router.tenants.registry import TenantConfig, one_sided_sharing, prefix_cache_groups


def tenants(**names: list[str]) -> list[TenantConfig]:
    return [
        TenantConfig.model_validate({"name": name, "keysPath": "k", "sharePrefixCacheWith": others})
        for name, others in names.items()
    ]


def groups(**names: list[str]) -> set[str]:
    return {group.replace(",", "") for group in prefix_cache_groups(tenants(**names)).values()}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        pytest.param({"a": [], "b": []}, {"a", "b"}, id="alone"),
        pytest.param({"a": ["b"], "b": ["a"], "c": []}, {"ab", "c"}, id="both-ways"),
        pytest.param({"a": ["b"], "b": []}, {"a", "b"}, id="one-way"),
        pytest.param({"a": ["a", "x"]}, {"a"}, id="itself-and-nobody"),
        pytest.param(
            {"a": ["b", "c"], "b": ["a", "c"], "c": ["a", "b"]}, {"abc"}, id="all-of-three"
        ),
        pytest.param(
            {"a": ["b"], "b": ["a", "c"], "c": ["b"]}, {"a", "b", "c"}, id="not-all-of-three"
        ),
    ],
)
def test_prefixes_are_shared_only_by_mutual_consent(
    names: dict[str, list[str]], expected: set[str]
) -> None:
    assert groups(**names) == expected


def test_a_group_with_other_members_is_another_group() -> None:
    """Otherwise a new member could detect blocks that were cached before it joined."""
    before = prefix_cache_groups(tenants(a=["b"], b=["a"]))["a"]
    after = prefix_cache_groups(tenants(a=["b", "c"], b=["a", "c"], c=["a", "b"]))["a"]
    assert before != after


def test_one_sided_sharing_is_reported() -> None:
    config = tenants(a=["b"], b=[], c=["x"])
    assert one_sided_sharing(config, prefix_cache_groups(config)) == [("a", "b"), ("c", "x")]
