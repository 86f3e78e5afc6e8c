from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path

import pytest

from faasmoe_contracts import api_keys
from faasmoe_contracts.api_keys import KeyReadError, KeyRing, key_digest, read_key_digests

KEY = "sk-acme-1"


def mount(folder: Path, version: str, **contents: str) -> None:
    """Replace a Secret's files as a kubelet does: a new folder, then an atomic swap of a link."""
    data = folder / f"..{version}"
    data.mkdir(parents=True)
    for name, content in contents.items():
        (data / name).write_text(content)
    (folder / "..data_tmp").symlink_to(data.name)
    os.replace(folder / "..data_tmp", folder / "..data")
    for name in contents:
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(Path("..data") / name)
    for link in folder.iterdir():
        if link.is_symlink() and not link.exists():
            link.unlink()


def test_each_file_is_a_key_without_its_line_break(tmp_path: Path) -> None:
    (tmp_path / "first").write_text(f"{KEY}\n")
    (tmp_path / "second").write_bytes(b"with-return\r\n")
    (tmp_path / "third").write_text(" spaces are kept ")
    (tmp_path / ".hidden").write_text("none")
    expected = {key_digest(key) for key in (KEY, "with-return", " spaces are kept ")}
    assert read_key_digests(tmp_path) == expected


def test_only_digests_are_kept(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY)
    (digest,) = read_key_digests(tmp_path)
    assert digest == hashlib.sha256(KEY.encode()).digest()
    assert KEY not in repr(KeyRing({"acme": frozenset({digest})}))


def test_a_mounted_secret_is_read_through_its_links(tmp_path: Path) -> None:
    mount(tmp_path, "v1", old="one")
    assert read_key_digests(tmp_path) == {key_digest("one")}
    mount(tmp_path, "v2", old="one", new="two")
    assert read_key_digests(tmp_path) == {key_digest("one"), key_digest("two")}
    mount(tmp_path, "v3", new="two")
    assert read_key_digests(tmp_path) == {key_digest("two")}


def test_a_folder_replaced_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount(tmp_path, "v1", old="one")
    read = api_keys._digest_of_file

    def swap_first(path: Path) -> bytes:
        monkeypatch.setattr(api_keys, "_digest_of_file", read)
        mount(tmp_path, "v2", new="two")
        return read(path)

    monkeypatch.setattr(api_keys, "_digest_of_file", swap_first)
    assert read_key_digests(tmp_path) == {key_digest("two")}


def test_a_missing_folder_has_no_keys(tmp_path: Path) -> None:
    assert read_key_digests(tmp_path / "missing") == frozenset()


@pytest.mark.parametrize("content", [b"", b"\n", b"k" * (api_keys.MAX_KEY_BYTES + 1)])
def test_an_invalid_key_is_reported_without_its_content(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(KeyReadError, match="key: got") as refused:
        read_key_digests(tmp_path)
    assert "kkk" not in str(refused.value)


def test_a_folder_among_the_keys_is_reported(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(KeyReadError, match="folder: Is a directory"):
        read_key_digests(tmp_path)


def test_too_many_keys_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_keys, "MAX_KEYS", 2)
    for number in range(3):
        (tmp_path / f"key{number}").write_text(f"k{number}")
    with pytest.raises(KeyReadError, match="got 3 keys, expected at most 2"):
        read_key_digests(tmp_path)


def ring(**texts: list[str]) -> KeyRing:
    return KeyRing({name: frozenset(map(key_digest, api_keys)) for name, api_keys in texts.items()})


def test_a_key_belongs_to_its_tenant() -> None:
    found = ring(acme=["a1", "a2"], beta=["b1"])
    assert [found.find_tenant(key) for key in ("a1", "a2", "b1")] == ["acme", "acme", "beta"]
    assert [found.find_tenant(key) for key in ("", "a", "A1", "a1 ", "b1\udc80")] == [None] * 5
    assert found.n_keys == {"acme": 2, "beta": 1}


def test_a_key_of_two_tenants_authenticates_neither() -> None:
    found = ring(acme=["shared", "a"], beta=["shared"])
    assert found.find_tenant("shared") is None
    assert found.find_tenant("a") == "acme"
    assert (found.n_keys, found.n_shared_keys) == ({"acme": 1, "beta": 0}, 1)


@pytest.mark.parametrize("key", ["first", "last", "none", ""])
def test_every_digest_is_compared_whichever_matches(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = ring(a=["first", "x"], b=["y", "z"], c=["last"])
    compared = []
    compare = hmac.compare_digest

    def counted(a: bytes, b: bytes) -> bool:
        compared.append(len(a) == len(b) == 32)
        return compare(a, b)

    monkeypatch.setattr("faasmoe_contracts.api_keys.hmac.compare_digest", counted)
    found.find_tenant(key)
    assert compared == [True] * 5
