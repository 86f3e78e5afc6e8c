"""What is fetched from peers is verified, is only what a function needs, and is bounded."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from sandbox_processes import PreparedStore, make_function_spec

from faasmoe_contracts.store import MANIFEST_NAME, Store
from faasmoe_contracts.store.digests import block_buffers
from faasmoe_expert.blocks.cache import BlockCache
from faasmoe_expert.blocks.client import PeerClient
from faasmoe_expert.blocks.index import BlockIndex, FileRange
from faasmoe_expert.errors import OutOfMemory, StoreUnavailable

TOKEN = "peer-token"
NOBODY = "http://127.0.0.1:1"


def make_cache(folder: Path, *urls: str, limit_bytes: int | None = None) -> BlockCache:
    peers = PeerClient(urls, token=TOKEN, retry_delays_s=(0.0,) * 4, sleep=lambda _: None)
    return BlockCache(folder / "cache", peers, limit_bytes=limit_bytes)


class DamagedIndex(BlockIndex):
    """Serves bytes of another place for every block."""

    def block(self, digest: str) -> tuple[FileRange, ...] | None:
        ranges = super().block(digest)
        return ranges and tuple(dataclasses.replace(r, offset=r.offset + 4) for r in ranges)


def expert_bytes(store: Store, layer: int, expert: int) -> bytes:
    mapped = store.map_layer(layer)
    return b"".join(block_buffers(mapped, store.manifest.layers[layer].num_experts, expert))


def test_a_fetched_function_is_as_in_the_store_and_nothing_else_is_there(
    store: Store, start_server: Callable[..., str], tmp_path: Path
) -> None:
    spec = make_function_spec(store, [0, 2], [1, 5])
    cached = make_cache(tmp_path, start_server()).ensure(spec, store.manifest.digest)
    copy = Store.open(cached.path)
    for layer in (0, 2):
        for expert in (1, 5):
            assert expert_bytes(copy, layer, expert) == expert_bytes(store, layer, expert)
        assert not any(expert_bytes(copy, layer, 3))
    layers = [store.manifest.layers[i] for i in (0, 2)]
    assert cached.fetched_bytes == sum(2 * e.expert_bytes + e.shared_bytes for e in layers)
    assert {(b.block, b.digest) for b in cached.fetched} == {
        (b, layer.digests[b]) for layer in layers for b in (1, 5, layer.num_experts)
    }


def test_a_function_that_is_there_is_not_fetched_again(
    store: Store, start_server: Callable[..., str], tmp_path: Path
) -> None:
    spec = make_function_spec(store, [0], [1])
    cache = make_cache(tmp_path, start_server())
    first = cache.ensure(spec, store.manifest.digest)
    cache.release(first.path)
    again = cache.ensure(dataclasses.replace(spec, id="another"), store.manifest.digest)
    assert (again.path, again.fetched) == (first.path, ())


def test_damaged_bytes_of_one_peer_are_fetched_from_the_next(
    store: Store, start_server: Callable[..., str], tmp_path: Path
) -> None:
    urls = start_server(DamagedIndex(store)), start_server()
    spec = make_function_spec(store, [1], [0, 1, 2, 3])
    cached = make_cache(tmp_path, *urls).ensure(spec, store.manifest.digest)
    copy = Store.open(cached.path)
    assert [expert_bytes(copy, 1, e) for e in range(4)] == [
        expert_bytes(store, 1, e) for e in range(4)
    ]


class DamagedFiles(BlockIndex):
    """Serves a file of a folder in place of the store's of the same name, if it has one."""

    def __init__(self, store: Store, folder: Path) -> None:
        super().__init__(store)
        self._folder = folder

    def file(self, name: str) -> FileRange | None:
        path = self._folder / name
        return FileRange(path, 0, path.stat().st_size) if path.exists() else super().file(name)


@pytest.mark.parametrize(("family", "name"), [("mixtral", MANIFEST_NAME), ("deepseek_v4", None)])
def test_a_damaged_file_of_one_peer_is_read_from_the_next(
    prepared_store: PreparedStore,
    start_server: Callable[..., str],
    tmp_path: Path,
    family: str,
    name: str | None,
) -> None:
    store, damaged = prepared_store(family), tmp_path / "damaged"
    names = [n for n in store.manifest.files if n.startswith("model/")] if name is None else [name]
    for file in names:
        (damaged / file).parent.mkdir(parents=True, exist_ok=True)
        (damaged / file).write_bytes((store.path / file).read_bytes().replace(b"1", b"2"))
    urls = start_server(DamagedFiles(store, damaged)), start_server(BlockIndex(store))
    for order in (urls, urls[::-1]):
        cache = make_cache(tmp_path / order[0].rpartition(":")[2], *order)
        path = cache.ensure(make_function_spec(store, [0], [0]), store.manifest.digest).path
        assert Store.open(path).manifest == store.manifest


def test_only_what_a_cache_has_made_is_removed_at_its_start(
    store: Store, start_server: Callable[..., str], tmp_path: Path
) -> None:
    other = tmp_path / "cache" / "of another program" / "file"
    other.parent.mkdir(parents=True)
    other.touch()
    url, spec = start_server(), make_function_spec(store, [0], [0])
    path = make_cache(tmp_path, url).ensure(spec, store.manifest.digest).path
    make_cache(tmp_path, url)
    assert not path.exists()
    assert other.exists()


def test_damaged_bytes_never_become_a_function(
    store: Store, start_server: Callable[..., str], tmp_path: Path
) -> None:
    cache = make_cache(tmp_path, start_server(DamagedIndex(store)))
    with pytest.raises(StoreUnavailable, match=r"store: .*got digest \w+, expected \w+"):
        cache.ensure(make_function_spec(store, [1], [0]), store.manifest.digest)
    assert list((tmp_path / "cache").iterdir()) == []
    assert cache.used_bytes == 0


def test_another_store_is_refused(
    prepared_store: PreparedStore, start_server: Callable[..., str], tmp_path: Path
) -> None:
    other, store = prepared_store("qwen2_moe"), prepared_store("mixtral")
    cache = make_cache(tmp_path, start_server())
    with pytest.raises(StoreUnavailable, match="no peer served it"):
        cache.ensure(make_function_spec(store, [0], [0]), other.manifest.digest)


def test_a_peer_that_is_away_is_passed_over(
    store: Store, start_server: Callable[..., str], tmp_path: Path
) -> None:
    cache = make_cache(tmp_path, NOBODY, start_server())
    assert cache.ensure(make_function_spec(store, [0], [0]), store.manifest.digest).fetched


def test_without_a_peer_the_error_names_each(store: Store, tmp_path: Path) -> None:
    cache = make_cache(tmp_path, NOBODY)
    with pytest.raises(StoreUnavailable, match=f"{NOBODY}: .*refused"):
        cache.ensure(make_function_spec(store, [0], [0]), store.manifest.digest)


def test_a_peer_whose_store_was_truncated_is_no_peer(
    store: Store, start_server: Callable[..., str], tmp_path: Path
) -> None:
    copy = tmp_path / "store"
    shutil.copytree(store.path, copy)
    url = start_server(BlockIndex(Store.open(copy)))
    file = copy / store.manifest.layers[0].file
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size // 2)
    with pytest.raises(StoreUnavailable):
        make_cache(tmp_path, url).ensure(
            make_function_spec(store, [0], range(8)), store.manifest.digest
        )


def test_functions_out_of_use_make_room_the_oldest_first(
    store: Store, start_server: Callable[..., str], tmp_path: Path
) -> None:
    size_bytes = store.manifest.layers[0].expert_bytes + store.manifest.layers[0].shared_bytes
    cache = make_cache(tmp_path, start_server(), limit_bytes=3 * size_bytes)
    digest = store.manifest.digest
    specs = [make_function_spec(store, [0], [expert]) for expert in range(4)]
    paths = [cache.ensure(spec, digest).path for spec in specs[:3]]
    for path in paths[1:]:
        cache.release(path)
    cache.ensure(specs[1], digest)  # used again, so the third is the oldest
    cache.release(paths[1])
    cache.ensure(specs[3], digest)
    assert [path.exists() for path in paths] == [True, True, False]
    assert cache.used_bytes == 3 * size_bytes


def test_what_does_not_fit_beside_functions_in_use_is_refused(
    store: Store, start_server: Callable[..., str], tmp_path: Path
) -> None:
    layer = store.manifest.layers[0]
    limit_bytes = layer.expert_bytes + layer.shared_bytes
    cache = make_cache(tmp_path, start_server(), limit_bytes=limit_bytes)
    used = cache.ensure(make_function_spec(store, [0], [0]), store.manifest.digest)
    with pytest.raises(OutOfMemory, match="cache has 0 bytes"):
        cache.ensure(make_function_spec(store, [0], [1]), store.manifest.digest)
    assert (used.path / MANIFEST_NAME).exists()


def test_a_layer_that_lies_in_the_checkpoint_is_refused(
    prepared_store: PreparedStore, start_server: Callable[..., str], tmp_path: Path
) -> None:
    store = prepared_store("mixtral", mode="reference")
    cache = make_cache(tmp_path, start_server(BlockIndex(store)))
    with pytest.raises(StoreUnavailable, match="lies in the checkpoint"):
        cache.ensure(make_function_spec(store, [0], [0]), store.manifest.digest)
