"""A manifest's references stay inside the checkpoint's folder and its files."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faasmoe_contracts.store import StoreError
from faasmoe_contracts.store.referenced_files import FilePlace
from faasmoe_contracts.store.references import (
    CheckpointEntry,
    TensorReference,
    checkpoint_root,
    describe_weights,
)

Change = Callable[[dict[str, Any]], object]

ENTRY: dict[str, Any] = {
    "root": "../checkpoint",
    "files": [{"name": "a/model.safetensors", "size_bytes": 1000}],
    "layers": {
        "0": {
            "down_proj": {
                "dtype": "BF16",
                "shape": [2, 4, 8],
                "length": 64,
                "pieces": [[0, 101], [0, 200]],
            }
        }
    },
    "router": {
        "norm": {
            "dtype": "F32",
            "shape": [4],
            "length": 16,
            "pieces": [[0, 984]],
            "digest": "0" * 32,
        }
    },
    "copied": {"quantised": ["x.experts"]},
}


def entry(change: Change = lambda _: None) -> CheckpointEntry:
    value = copy.deepcopy(ENTRY)
    change(value)
    return CheckpointEntry.from_json(value)


def test_round_trips_through_json() -> None:
    assert entry().to_json() == ENTRY
    assert entry().size_bytes == 128 + 16
    assert entry().router_bytes == 16


def test_outermost_pieces_of_each_file() -> None:
    in_one = TensorReference("U8", (3, 8), ((2, 40), (2, 8), (2, 90)))
    assert in_one.outer_offsets() == {2: (8, 90)}
    in_two = TensorReference("U8", (4, 8), ((2, 40), (0, 8), (2, 16), (0, 96)))
    assert in_two.outer_offsets() == {2: (16, 40), 0: (8, 96)}


def setting(*path: str | int, to: object) -> Change:
    def change(value: Any) -> None:
        for key in path[:-1]:
            value = value[key]
        value[path[-1]] = to

    return change


DOWN = ("layers", "0", "down_proj")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (setting("root", to="checkpoint"), r"root: got 'checkpoint', expected an absolute path"),
        (setting("root", to=".."), "root: got '..'"),
        (setting("root", to="../../x"), "root: got '../../x'"),
        (setting("root", to="../a/../../x"), "root"),
        (setting("root", to="/"), "root: got '/', expected a folder below the root"),
        (setting("root", to="/a\0b"), "root"),
        (setting("files", 0, "name", to="/etc/shadow"), r"files\[0\]\.name: got '/etc/shadow'"),
        (setting("files", 0, "name", to="../x"), "name: got '../x', expected a path inside"),
        (setting("files", 0, "name", to="a/../../x"), "name"),
        (setting("files", 0, "name", to="."), "name"),
        (setting("files", 0, "size_bytes", to=200), "pieces: .* expected .* inside the file"),
        (setting(*DOWN, "pieces", 0, 0, to=1), "pieces"),
        (setting(*DOWN, "pieces", 0, 0, to=-1), "pieces"),
        (setting(*DOWN, "pieces", 1, 1, to=937), "pieces"),
        (setting(*DOWN, "pieces", 1, 1, to=True), "pieces"),
        (setting(*DOWN, "pieces", to=[]), "pieces"),
        (
            setting(*DOWN, "pieces", to=[[0, 0]] * 3),
            "pieces: got 3, expected one, or a multiple of 2",
        ),
        (setting(*DOWN, "length", to=32), "length: got 32, expected 128 bytes in 2 pieces"),
        (setting(*DOWN, "shape", to=[2, 0, 8]), "shape"),
        (setting(*DOWN, "dtype", to="F4"), "dtype: got 'F4'"),
        (setting(*DOWN, "more", to=1), "unknown fields more"),
        (setting("layers", "00", to={}), "index '00'"),
        (setting("router", "norm", "digest", to="x"), "digest: got 'x'"),
        (setting("copied", "x", to=1), "copied"),
    ],
)
def test_names_the_wrong_field(change: Change, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        entry(change)


def test_a_link_below_the_folder_leads_nowhere(tmp_path: Path) -> None:
    checkpoint, store, outside = (tmp_path / n for n in ("checkpoint", "store", "outside"))
    for folder in (checkpoint, store, outside):
        folder.mkdir()
    (outside / "model.safetensors").write_bytes(bytes(1000))
    (checkpoint / "a").symlink_to(outside)
    with pytest.raises(StoreError, match="through a symbolic link"):
        entry().check_file(store, 0)
    (checkpoint / "a").unlink()
    outside.rename(checkpoint / "a")
    assert entry().check_file(store, 0) == checkpoint / "a" / "model.safetensors"
    with pytest.raises(StoreError, match="got no regular file"):
        entry(
            lambda value: value.update(root="/dev", files=[{"name": "zero", "size_bytes": 1000}])
        ).check_file(store, 0)


def test_folders_beside_each_other_move_together() -> None:
    assert checkpoint_root(Path("/m/checkpoint"), Path("/m/store")) == "../checkpoint"
    assert checkpoint_root(Path("/m/a/b"), Path("/m/store")) == "../a/b"
    assert checkpoint_root(Path("/m/a"), Path("/m/b/store")) == "/m/a"
    assert checkpoint_root(Path("/m"), Path("/m/store")) == "/m"


def test_describes_what_lies_where() -> None:
    assert describe_weights(2, None) == ["copied into the store"]
    first, second = describe_weights(2, entry())
    assert first.startswith("0.00 GB by reference to ../checkpoint, which must stay: 1 of 2 MoE")
    assert second == "copied: x.experts: quantised"


SHARED = {"name": "shared/0", "size_bytes": 1000, "place": "shared", "origin": "/a/model"}
OWN = {"name": "experts/0", "size_bytes": 1000, "place": "store"}


def test_files_of_the_store_and_shared_ones_need_no_checkpoint(tmp_path: Path) -> None:
    def change(value: dict[str, Any]) -> None:
        del value["root"]
        value["files"] = [SHARED, OWN]
        value["layers"]["0"]["down_proj"]["pieces"] = [[0, 101], [1, 200]]

    value = copy.deepcopy(ENTRY)
    change(value)
    parsed = entry(change)
    assert parsed.to_json() == value
    assert parsed.bytes_in(FilePlace.SHARED) == 64 + 16
    assert parsed.size_bytes == 64 + 16  # those of the store are among its own files
    assert parsed.bytes_in(*FilePlace) == 128 + 16
    assert describe_weights(2, parsed)[0].endswith("by hard links of /a/model")
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "0").write_bytes(bytes(999))
    with pytest.raises(StoreError, match=r"/a/model, which it shares, changed since .* --force"):
        parsed.check_file(tmp_path, 0)
    (tmp_path / "shared" / "0").write_bytes(bytes(1000))
    assert parsed.check_file(tmp_path, 0) == tmp_path / "shared" / "0"
    with pytest.raises(StoreError, match=r"experts/0: .* refers to this file of its own"):
        parsed.check_file(tmp_path, 1)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (SHARED | {"place": "checkpoint"}, "place: got 'checkpoint', expected one of store, shar"),
        (SHARED | {"place": "store"}, "unknown fields origin"),
        ({k: v for k, v in SHARED.items() if k != "origin"}, "origin: got nothing"),
        (SHARED | {"name": "../a"}, "name: got '../a', expected a path inside the store's folder"),
        ({"name": "a", "size_bytes": 1000}, "root: got '', expected an absolute path"),
    ],
)
def test_names_the_wrong_field_of_a_shared_file(file: dict[str, Any], message: str) -> None:
    def change(value: dict[str, Any]) -> None:
        del value["root"]
        value["files"] = [file]

    with pytest.raises(StoreError, match=message):
        entry(change)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2000) | st.text(max_size=6),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=3), children, max_size=3)
    ),
    max_leaves=8,
)


@given(
    value=JSON,
    path=st.sampled_from(
        [
            ("root",),
            ("files",),
            ("files", 0, "name"),
            ("files", 0, "place"),
            DOWN,
            (*DOWN, "pieces"),
            (*DOWN, "shape"),
            (*DOWN, "length"),
            ("layers",),
            ("router", "norm"),
        ]
    ),
)
def test_any_value_in_any_field_parses_or_raises_store_error(
    value: object, path: tuple[str | int, ...]
) -> None:
    try:
        parsed = entry(setting(*path, to=value))
    except StoreError:
        return
    assert CheckpointEntry.from_json(parsed.to_json()) == parsed
