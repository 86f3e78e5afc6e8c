"""Checkpoints of object stores and web servers are downloaded once and prepared as others are."""

from __future__ import annotations

import functools
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
import pytest
from fsspec.implementations.memory import MemoryFileSystem  # type: ignore[import-untyped]

from faasmoe_contracts.store import MANIFEST_NAME, Store
from faasmoe_router.checkpoint.__main__ import main
from faasmoe_router.checkpoint.object_store import (
    DOWNLOAD_DIR_ENV,
    download_dir,
    locked_download_dir,
)
from faasmoe_router.checkpoint.prepare import prepare
from faasmoe_router.checkpoint.source import CheckpointSource, resolve_source
from faasmoe_router.errors import (
    HubUnauthorized,
    HubUnavailable,
    PrepareError,
    SourceNotFound,
    SourceUnsupported,
    StoreMismatch,
)

MakeCheckpoint = Callable[..., Path]
BUCKET = "s3://models/tiny"


class Bucket(MemoryFileSystem):  # type: ignore[misc]
    """An object store in memory, for the scheme s3."""

    protocol = "s3"
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs: list[str] = [""]  # noqa: RUF012
    opened: list[str] = []  # noqa: RUF012
    error: Exception | None = None

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("s3://").strip("/")

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if (error := type(self).error) is not None:
            raise error
        self.opened.append(path.rpartition("/")[2])
        return super().open(path, mode, **options)

    def put_folder(self, folder: Path, url: str) -> None:
        for path in folder.rglob("*"):
            if path.is_file():
                self.pipe(f"{url}/{path.relative_to(folder)}", path.read_bytes())


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Bucket]:
    fsspec.register_implementation("s3", Bucket, clobber=True)
    monkeypatch.setenv(DOWNLOAD_DIR_ENV, str(tmp_path / "downloads"))
    made = Bucket()
    yield made
    Bucket.store.clear()
    Bucket.opened.clear()
    Bucket.error = None


@pytest.fixture
def web_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path]]:
    """A web server, and the folder that it serves."""
    monkeypatch.setenv(DOWNLOAD_DIR_ENV, str(tmp_path / "downloads"))
    folder = tmp_path / "www"
    folder.mkdir()
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", folder
        finally:
            server.shutdown()
            thread.join()


def expert_digests(store: Store) -> list[tuple[str, ...]]:
    return [layer.digests for layer in store.manifest.layers]


def test_a_bucket_is_prepared_as_its_folder_is(
    bucket: Bucket, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    folder = make_checkpoint(max_shard_size="20KB")
    bucket.put_folder(folder, BUCKET)
    store = prepare(BUCKET, tmp_path / "store")
    assert expert_digests(store) == expert_digests(prepare(str(folder), tmp_path / "other"))
    assert store.manifest.model.source == BUCKET


def test_a_web_server_is_prepared_as_its_folder_is(
    web_server: tuple[str, Path], make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    url, www = web_server
    folder = make_checkpoint(max_shard_size="20KB")
    shutil.copytree(folder, www / "tiny")
    store = prepare(f"{url}/tiny/", tmp_path / "store")
    assert expert_digests(store) == expert_digests(prepare(str(folder), tmp_path / "other"))


def test_what_is_there_is_not_downloaded_again(
    bucket: Bucket, make_checkpoint: MakeCheckpoint
) -> None:
    bucket.put_folder(make_checkpoint(max_shard_size="20KB"), BUCKET)
    first = resolve_source(BUCKET, revision=None)
    assert len(bucket.opened) >= 3
    shard = first.weight_files[0]
    shard.unlink()
    bucket.opened.clear()
    again = resolve_source(BUCKET, revision=None)
    assert bucket.opened == [shard.name]
    assert again.revision == first.revision
    assert first.folder == download_dir(BUCKET)


def test_the_revision_changes_with_the_content(
    bucket: Bucket, make_checkpoint: MakeCheckpoint
) -> None:
    folder = make_checkpoint()
    bucket.put_folder(folder, BUCKET)
    first = resolve_source(BUCKET, revision=None)
    config = json.loads((folder / "config.json").read_text())
    bucket.pipe(f"{BUCKET}/config.json", json.dumps({**config, "note": "x"}).encode())
    assert resolve_source(BUCKET, revision=None).revision != first.revision


def test_what_was_replaced_by_as_many_bytes_is_downloaded_again(
    web_server: tuple[str, Path], make_checkpoint: MakeCheckpoint
) -> None:
    url, www = web_server
    shutil.copytree(make_checkpoint(), www / "tiny")
    first = resolve_source(f"{url}/tiny", revision=None)
    remote = www / "tiny" / "model.safetensors"
    content = bytearray(remote.read_bytes())
    content[-1] ^= 1
    remote.write_bytes(content)
    os.utime(remote, (1, 1))  # Last-Modified has seconds
    again = resolve_source(f"{url}/tiny", revision=None)
    assert again.revision != first.revision
    assert again.weight_files[0].read_bytes() == content


def test_downloads_of_one_url_wait_for_each_other(
    bucket: Bucket, make_checkpoint: MakeCheckpoint
) -> None:
    bucket.put_folder(make_checkpoint(max_shard_size="20KB"), BUCKET)
    bucket.opened.clear()
    found: list[CheckpointSource] = []
    with locked_download_dir(BUCKET):
        thread = threading.Thread(
            target=lambda: found.append(resolve_source(BUCKET, revision=None))
        )
        thread.start()
        thread.join(0.2)
        assert not bucket.opened
    thread.join()
    assert found
    assert bucket.opened


@pytest.mark.parametrize(
    "source",
    [
        "https://me:hunter2@models.example/tiny",
        "s3://key:hunter2@models/tiny",
        "https://models.example/tiny?signature=hunter2",
    ],
)
def test_a_url_with_credentials_is_refused_and_not_shown(
    make_checkpoint: MakeCheckpoint,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    source: str,
) -> None:
    store = tmp_path / "store"
    assert main(["prepare", source, str(store)]) != 0
    prepare(str(make_checkpoint()), store, force=True)
    assert main(["prepare", source, str(store), "--existing"]) != 0
    shown = "".join(capsys.readouterr())
    assert shown.count("with a user name or a query") == 2
    assert "hunter2" not in shown


def test_a_bucket_that_is_not_there_is_named(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> list[str]:
        raise FileNotFoundError("The specified bucket does not exist")

    monkeypatch.setattr(Bucket, "find", fail)
    with pytest.raises(SourceNotFound, match=r"got 's3://models/tiny': .*bucket does not exist"):
        resolve_source(BUCKET, revision=None)


def test_a_complete_store_is_accepted_without_its_bucket(
    bucket: Bucket, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    bucket.put_folder(make_checkpoint(), BUCKET)
    store, message = tmp_path / "store", tmp_path / "message"
    arguments = ["prepare", BUCKET, str(store), "--termination-log", str(message)]
    downloads = ["--discard-download", str(tmp_path / "downloads")]
    assert main([*arguments, *downloads]) == 0
    assert not (tmp_path / "downloads").exists()
    Bucket.error = PermissionError("gone")
    assert main(arguments) == 0
    assert json.loads(message.read_text())["source"] == BUCKET
    assert main(["prepare", f"{BUCKET}/other", *arguments[2:]]) == 2
    assert json.loads(message.read_text())["reason"] == StoreMismatch.reason


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (PermissionError("403"), HubUnauthorized, "access is denied: 403"),
        (ConnectionResetError("reset"), HubUnavailable, "ConnectionResetError: reset"),
        (ValueError("odd"), HubUnavailable, "ValueError: odd"),
    ],
)
def test_what_fails_has_a_reason(
    bucket: Bucket,
    make_checkpoint: MakeCheckpoint,
    error: Exception,
    expected: type[PrepareError],
    message: str,
) -> None:
    bucket.put_folder(make_checkpoint(), BUCKET)
    Bucket.error = error
    with pytest.raises(expected, match=message):
        resolve_source(BUCKET, revision=None)


def test_a_file_that_is_missing_is_named(bucket: Bucket, make_checkpoint: MakeCheckpoint) -> None:
    with pytest.raises(SourceNotFound, match="expected a folder with files"):
        resolve_source(BUCKET, revision=None)
    folder = make_checkpoint()
    bucket.put_folder(folder, BUCKET)
    bucket.rm(f"{BUCKET}/model.safetensors")
    with pytest.raises(SourceNotFound, match=r"no model\.safetensors in it"):
        resolve_source(BUCKET, revision=None)
    bucket.rm(f"{BUCKET}/config.json")
    with pytest.raises(SourceNotFound, match=r"has no config\.json"):
        resolve_source(BUCKET, revision=None)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: str) -> None:
        raise ImportError("Install gcsfs")

    monkeypatch.setattr("fsspec.core.url_to_fs", fail)
    with pytest.raises(SourceUnsupported, match=r"needs the package gcsfs: pip install"):
        resolve_source("gs://models/tiny", revision=None)


def test_a_bucket_has_no_revisions(bucket: Bucket) -> None:
    with pytest.raises(PrepareError, match="revision: got 'main', expected none"):
        resolve_source(BUCKET, revision="main")


def test_an_existing_store_is_accepted_from_a_read_only_folder(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    store, message = tmp_path / "store", tmp_path / "message"
    prepare(str(make_checkpoint()), store)
    source = Store.open(store).manifest.model.source
    before = {path: os.stat(path).st_mtime_ns for path in store.rglob("*")}
    arguments = [str(store), "--existing", "--termination-log", str(message)]
    assert main(["prepare", source, *arguments]) == 0
    assert json.loads(message.read_text())["ok"]
    assert {path: os.stat(path).st_mtime_ns for path in store.rglob("*")} == before
    assert main(["prepare", "hf://another/model", *arguments]) == 2
    assert json.loads(message.read_text())["reason"] == StoreMismatch.reason


def test_an_existing_store_must_be_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", "hf://org/name", str(tmp_path), "--existing"]) == 1
    assert f"without {MANIFEST_NAME}, expected a store" in capsys.readouterr().err
