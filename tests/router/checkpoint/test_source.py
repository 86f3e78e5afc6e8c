import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from faasmoe_router.checkpoint.prepare import prepare
from faasmoe_router.checkpoint.source import resolve_source
from faasmoe_router.errors import PrepareError

MakeCheckpoint = Callable[..., Path]

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_file_url_names_a_folder(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint(name="with space")
    source = resolve_source(f"file://{str(folder).replace(' ', '%20')}", revision=None)
    assert (source.folder, source.revision) == (folder, None)


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        pytest.param("/no/such/folder", None, "expected a folder that exists", id="folder"),
        pytest.param("file:///no/such", None, "expected a folder that exists", id="file"),
        pytest.param("./no/such", None, "expected a folder that exists", id="relative"),
        pytest.param("name", None, "expected a folder that exists or ORG/NAME", id="name"),
        pytest.param("ftp://host/model", None, "got 'ftp://host/model', expected", id="scheme"),
        pytest.param("/tmp", "main", "revision: got 'main', expected none", id="revision"),
        pytest.param("/proc", None, r"/proc/config\.json: cannot be read", id="no-config"),
    ],
)
def test_inaccessible_source_is_rejected(name: str, revision: str | None, message: str) -> None:
    with pytest.raises(PrepareError, match=message):
        resolve_source(name, revision=revision)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00", '{"a":' * 100_000, "9" * 10_000])
def test_invalid_config_is_named(make_checkpoint: MakeCheckpoint, text: str) -> None:
    folder = make_checkpoint()
    (folder / "config.json").write_text(text)
    with pytest.raises(PrepareError, match=r"config\.json: got"):
        resolve_source(str(folder), revision=None)


def test_a_config_beyond_any_size_is_not_read(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("faasmoe_router.checkpoint.source.MAX_JSON_BYTES", 1000)
    folder = make_checkpoint()
    with (folder / "config.json").open("ab") as file:
        file.truncate(1 << 40)  # sparse: takes no disk
    with pytest.raises(PrepareError, match=r"config\.json: got more than 1000 bytes"):
        resolve_source(str(folder), revision=None)


def test_missing_shard_is_named(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint(max_shard_size="20KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(PrepareError, match=f"names {shard.name}, got only .* is stale or"):
        resolve_source(str(folder), revision=None)


def test_stale_index_beside_a_single_file_is_explained(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(PrepareError, match=r"delete model\.safetensors\.index\.json if"):
        resolve_source(str(folder), revision=None)


def test_shards_without_an_index_are_explained(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint(max_shard_size="20KB")
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(PrepareError, match=r"got model-.* and \d+ more without .*index"):
        resolve_source(str(folder), revision=None)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_pickled_weights_are_explained(make_checkpoint: MakeCheckpoint, name: str) -> None:
    folder = make_checkpoint()
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"x")
    with pytest.raises(PrepareError, match=f"got {name}, expected safetensors.*save_pretrained"):
        resolve_source(str(folder), revision=None)


@pytest.mark.parametrize(
    "index",
    [
        {},
        {"weight_map": {}},
        {"weight_map": ["a"]},
        {"weight_map": {"a": 1}},
        {"weight_map": {"a": "../other.safetensors"}},
        {"weight_map": {"a": "/etc/passwd"}},
        {"weight_map": {"a": ""}},
        {"weight_map": {"a": "x\0"}},
    ],
)
def test_weight_index_without_names_of_files_beside_it_is_rejected(
    make_checkpoint: MakeCheckpoint, index: object
) -> None:
    folder = make_checkpoint()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(PrepareError, match="weight_map: got"):
        resolve_source(str(folder), revision=None)


@pytest.mark.parametrize("damage", ["truncated", "empty", "header"])
def test_damaged_shard_is_named(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, damage: str
) -> None:
    folder = make_checkpoint()
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(
        {"truncated": content[:-9], "empty": b"", "header": b"\xff" * 8 + content[8:]}[damage]
    )
    with pytest.raises(PrepareError, match=r"model\.safetensors: got no readable"):
        prepare(str(folder), tmp_path / "store")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of the hub's local cache, in offline mode."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def _cache(hub: Path, checkpoint: Path) -> None:
    repository = hub / "models--org--name"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    checkpoint.rename(repository / "snapshots" / COMMIT)


@pytest.mark.parametrize("name", ["hf://org/name", "org/name"])
@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_cached_repository_is_pinned_to_its_commit(
    make_checkpoint: MakeCheckpoint, hub: Path, tmp_path: Path, name: str, max_shard_size: str
) -> None:
    _cache(hub, make_checkpoint(max_shard_size=max_shard_size))
    model = prepare(name, tmp_path / "store").manifest.model
    assert (model.source, model.revision) == (name, COMMIT)


def test_fingerprint_of_a_commit_ignores_file_times(
    make_checkpoint: MakeCheckpoint, hub: Path
) -> None:
    _cache(hub, make_checkpoint())
    source = resolve_source("org/name", revision=None)
    before = source.fingerprint(dtype=None)
    os.utime(source.weight_files[0])
    assert source.fingerprint(dtype=None) == before
    assert source.fingerprint(dtype="float16") != before


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "tokenizer.json", "additional_chat_templates/rag.jinja"]
)
def test_changed_auxiliary_file_is_another_checkpoint(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, name: str
) -> None:
    folder = make_checkpoint()
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    store = tmp_path / "store"
    prepare(str(folder), store)
    prepare(str(folder), store)
    (folder / name).write_text("[]")
    with pytest.raises(PrepareError, match=r"expected .* as it is now; --force"):
        prepare(str(folder), store)
    prepare(str(folder), store, force=True)
    assert (store / "model" / name).read_text() == "[]"


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_invalid_weight_index_of_a_repository_is_named(
    make_checkpoint: MakeCheckpoint, hub: Path, text: str
) -> None:
    folder = make_checkpoint()
    (folder / "model.safetensors.index.json").write_text(text)
    _cache(hub, folder)
    with pytest.raises(PrepareError, match=r"model\.safetensors\.index\.json: .*got"):
        resolve_source("org/name", revision=None)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("hf://org/name", "cannot be reached"),
        ("org/name", "cannot be reached"),
        ("hf://a/b/c", "expected ORG/NAME"),
    ],
)
@pytest.mark.usefixtures("hub")
def test_unreachable_repository_error_has_a_reason(name: str, reason: str) -> None:
    with pytest.raises(PrepareError, match=f"at revision 'v1', looked for at .*: .*{reason}"):
        resolve_source(name, revision="v1")
