"""Reload of the tenants file and the keys, at times passed in."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from faasmoe_router.errors import RouterConfigError
from faasmoe_router.tenants.registry import TenantRegistry


class Files:
    """A tenants file and its folders of keys."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "tenants.json"

    def tenants(self, *names: str, **fields: Any) -> None:
        tenants = [{"name": n, "keysPath": str(self.folder / n), **fields} for n in names]
        self.path.write_text(json.dumps({"version": 1, "model": "m", "tenants": tenants}))

    def keys(self, tenant: str, *keys: str) -> None:
        shutil.rmtree(self.folder / tenant, ignore_errors=True)
        (self.folder / tenant).mkdir()
        for number, key in enumerate(keys):
            (self.folder / tenant / f"key{number}").write_text(key)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    files = Files(tmp_path)
    files.tenants("acme", "beta")
    files.keys("acme", "a1")
    files.keys("beta", "b1")
    return files


def name_of(registry: TenantRegistry, key: str) -> str | None:
    tenant = registry.authenticate(key)
    return None if tenant is None else tenant.name


def test_tenants_are_authenticated_by_their_keys(files: Files) -> None:
    registry = TenantRegistry(files.path)
    assert [name_of(registry, key) for key in ("a1", "b1", "x", "")] == [
        "acme",
        "beta",
        None,
        None,
    ]


def test_keys_are_reloaded_after_the_refresh_interval(files: Files) -> None:
    registry = TenantRegistry(files.path, refresh_interval_s=1.0)
    assert not registry.refresh(0.0)
    files.keys("acme", "a2")
    assert not registry.refresh(0.9)
    assert name_of(registry, "a1") == "acme"
    assert not registry.refresh(1.0)  # the tenants file is unchanged
    assert name_of(registry, "a1") is None  # revoked
    assert name_of(registry, "a2") == "acme"


def test_tenants_are_added_and_removed_with_the_file(files: Files) -> None:
    registry = TenantRegistry(files.path)
    files.tenants("beta", "gamma", weight=3)
    files.keys("gamma", "g1")
    assert registry.refresh(0.0)
    assert [name_of(registry, key) for key in ("a1", "b1", "g1")] == [None, "beta", "gamma"]
    assert registry.tenants["gamma"].weight == 3


def test_an_invalid_file_prevents_the_start(files: Files) -> None:
    files.path.write_text('{"version": 3}')
    with pytest.raises(
        RouterConfigError, match=r"FAASMOE_TENANTS_FILE: .*tenants.json: version: got 3"
    ):
        TenantRegistry(files.path)
    with pytest.raises(RouterConfigError, match=r"FAASMOE_TENANTS_FILE: .*none.json"):
        TenantRegistry(files.folder / "none.json")


def test_a_file_damaged_later_keeps_the_last_version_and_is_logged_once(
    files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    registry = TenantRegistry(files.path)
    files.path.write_text("{")
    with caplog.at_level(logging.ERROR):
        for second in range(5):
            assert not registry.refresh(float(second))
    assert name_of(registry, "a1") == "acme"
    assert len(caplog.messages) == 1
    assert "keeping the last good version" in caplog.messages[0]
    files.path.unlink()
    registry.refresh(6.0)
    assert name_of(registry, "a1") == "acme"
    assert len(caplog.messages) == 2


def test_an_invalid_key_keeps_the_last_keys_of_that_tenant(
    files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    registry = TenantRegistry(files.path)
    files.keys("acme", "a2", "")
    files.keys("beta", "b2")
    with caplog.at_level(logging.ERROR):
        registry.refresh(0.0)
    assert [name_of(registry, key) for key in ("a1", "a2", "b2")] == ["acme", None, "beta"]
    assert "key1: got no key" in caplog.text
    assert "a2" not in caplog.text.replace(str(files.folder), "")


def test_a_key_of_two_tenants_authenticates_neither(
    files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    files.keys("beta", "a1", "b1")
    with caplog.at_level(logging.ERROR):
        registry = TenantRegistry(files.path)
    assert [name_of(registry, key) for key in ("a1", "b1")] == [None, "beta"]
    assert "1 belong to several tenants" in caplog.text
    assert registry.key_ring.n_keys == {"acme": 0, "beta": 1}
