"""The termination log of the prepare command: local folders, a fake hub over HTTP, a full disk."""

import errno
import json
import shutil
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from faasmoe_contracts.store import FileEntry, LayerEntry, Manifest, ModelEntry, Store
from faasmoe_router.checkpoint.__main__ import main
from faasmoe_router.checkpoint.prepare import prepare
from faasmoe_router.checkpoint.termination_message import (
    MAX_TERMINATION_MESSAGE_BYTES,
    failure_message,
    model_status,
    success_message,
)
from faasmoe_router.errors import PrepareError, SourceUnsupported, failure_reason

MakeCheckpoint = Callable[..., Path]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class PrepareJob:
    """Runs the prepare command with a termination log, as a Job's container does."""

    def __init__(self, folder: Path) -> None:
        self.store = folder / "store"
        self.log = folder / "termination-log"
        self.log.write_text("")

    def run(self, source: object, *options: str) -> tuple[int, dict[str, Any]]:
        arguments = [str(source), str(self.store), "--termination-log", str(self.log)]
        status = main(["prepare", *arguments, "--mode", "copy", *options])
        content = self.log.read_bytes()
        assert len(content) <= MAX_TERMINATION_MESSAGE_BYTES
        message: dict[str, Any] = json.loads(content)
        return status, message


@pytest.fixture
def job(tmp_path: Path) -> PrepareJob:
    return PrepareJob(tmp_path)


def test_success_message_describes_the_store(
    make_checkpoint: MakeCheckpoint, job: PrepareJob
) -> None:
    checkpoint = make_checkpoint()
    status, message = job.run(checkpoint, "--dtype", "float16")
    manifest = Store.open(job.store).manifest
    layer = manifest.layers[0]
    assert status == 0
    assert message == {
        "ok": True,
        "digest": manifest.digest,
        "source": str(checkpoint),
        "family": "qwen2_moe",
        "architecture": "Qwen2MoeForCausalLM",
        "dtype": "float16",
        "hiddenSize": 32,
        "vocabSize": 96,
        "maxPositionEmbeddings": 64,
        "numHiddenLayers": 2,
        "sizeBytes": sum(file.stat().st_size for file in _files_of(job.store)),
        "routerBytes": sum(file.stat().st_size for file in Store.open(job.store).router_files()),
        "layers": [
            {
                "count": 2,
                "numExperts": 6,
                "topK": 2,
                "expertBytes": layer.expert_bytes,
                "sharedBytes": 0,
            }
        ],
    }


def _files_of(store: Path) -> list[Path]:
    return [store / name for name in Store.open(store).manifest.files]


def test_repeated_run_has_the_same_message_and_reads_no_weights(
    make_checkpoint: MakeCheckpoint, job: PrepareJob
) -> None:
    checkpoint = make_checkpoint()
    _, first = job.run(checkpoint)
    weights = job.store / "experts" / "00000.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # found only by reading the whole file
    weights.write_bytes(content)
    assert job.run(checkpoint) == (0, first)


def _cache_checkpoint(checkpoint: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Move a checkpoint into the hub client's cache as org/name, and go offline."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    repository = folder / "models--org--name"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    checkpoint.rename(repository / "snapshots" / COMMIT)


def test_complete_store_of_a_hub_source_does_not_need_the_hub(
    make_checkpoint: MakeCheckpoint,
    job: PrepareJob,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    _cache_checkpoint(make_checkpoint(), tmp_path / "hub", monkeypatch)
    status, first = job.run("hf://org/name")
    assert (status, first["source"], first["revision"]) == (0, "hf://org/name", COMMIT)
    shutil.rmtree(tmp_path / "hub")
    assert job.run("hf://org/name") == (0, first)
    assert job.run("hf://org/name", "--revision", COMMIT) == (0, first)
    for other in (
        ["hf://org/other"],
        ["hf://org/name", "--revision", "f" * 40],
        ["hf://org/name", "--dtype", "float16"],
    ):
        status, message = job.run(*other)
        assert (status, message["reason"]) == (2, "StoreMismatch")
        assert "prepared from 'hf://org/name'" in message["message"]


def test_downloads_are_removed_only_when_the_store_is_complete(
    make_checkpoint: MakeCheckpoint,
    job: PrepareJob,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    downloads = tmp_path / ".hub" / "moe"
    _cache_checkpoint(make_checkpoint(), downloads / "hub", monkeypatch)
    discard = ("--discard-download", str(downloads))
    status, message = job.run("hf://org/name", *discard, "--revision", "no-such-branch")
    assert (status, message["reason"]) == (1, "HubUnavailable")
    assert downloads.exists()

    status, first = job.run("hf://org/name", *discard)
    assert status == 0
    assert not downloads.exists()
    Store.open(job.store).verify()

    downloads.mkdir()  # as if the pod had been evicted before it removed the downloads
    assert job.run("hf://org/name", *discard) == (0, first)
    assert not downloads.exists()


def test_downloads_folder_that_contains_the_store_is_rejected(
    make_checkpoint: MakeCheckpoint, job: PrepareJob
) -> None:
    checkpoint = make_checkpoint()
    assert job.run(checkpoint)[0] == 0
    status, message = job.run(checkpoint, "--discard-download", str(job.store.parent))
    assert status == 1
    assert message["message"].startswith("discard-download: got ")
    Store.open(job.store).verify()


def test_store_of_another_source_is_a_mismatch(
    make_checkpoint: MakeCheckpoint, job: PrepareJob
) -> None:
    job.run(make_checkpoint())
    status, message = job.run(make_checkpoint("mixtral", name="other"))
    assert (status, message["reason"]) == (2, "StoreMismatch")
    assert Store.open(job.store).manifest.model.family == "qwen2_moe"
    status, message = job.run(job.store.parent / "other", "--force")
    assert (status, message["family"]) == (0, "mixtral")


def test_folder_with_foreign_files_is_a_mismatch(
    make_checkpoint: MakeCheckpoint, job: PrepareJob
) -> None:
    job.store.mkdir()
    (job.store / "thesis.txt").write_text("years")
    status, message = job.run(make_checkpoint())
    assert (status, message["reason"]) == (2, "StoreMismatch")


def test_missing_source_is_retryable(tmp_path: Path, job: PrepareJob) -> None:
    for missing in (tmp_path / "nowhere", f"file://{tmp_path}/nowhere", tmp_path):
        status, message = job.run(missing)
        assert (status, message["reason"]) == (1, "SourceNotFound"), missing


def test_dense_model_is_a_permanent_failure(
    make_checkpoint: MakeCheckpoint, job: PrepareJob
) -> None:
    status, message = job.run(make_checkpoint("llama"))
    assert (status, message["reason"]) == (2, "SourceUnsupported")
    assert message["message"].startswith("model: got family 'llama'")


def test_quantized_checkpoint_is_a_permanent_failure(
    make_checkpoint: MakeCheckpoint, job: PrepareJob
) -> None:
    config = make_checkpoint() / "config.json"
    value = json.loads(config.read_text())
    config.write_text(json.dumps({**value, "quantization_config": {"quant_method": "fp8"}}))
    status, message = job.run(config.parent)
    assert (status, message["reason"]) == (2, "SourceUnsupported")
    assert "quant_method 'fp8'" in message["message"]


def test_damaged_source_or_store_is_a_retryable_failure(
    make_checkpoint: MakeCheckpoint, job: PrepareJob
) -> None:
    checkpoint = make_checkpoint()
    (checkpoint / "model.safetensors").write_bytes(b"")
    status, message = job.run(checkpoint)
    assert (status, message["reason"]) == (1, "Failed")
    job.run(make_checkpoint(name="intact"))
    (job.store / "experts" / "00000.safetensors").unlink()
    status, message = job.run(checkpoint.parent / "intact")
    assert (status, message["reason"]) == (1, "Failed")
    assert "00000.safetensors" in message["message"]


def test_full_disk_has_its_own_reason(make_checkpoint: MakeCheckpoint, job: PrepareJob) -> None:
    job.store.mkdir()
    (job.store / ".journal.partial").symlink_to("/dev/full")
    status, message = job.run(make_checkpoint())
    assert (status, message["reason"]) == (1, "NoSpace")
    assert "No space left on device" in message["message"]


def test_too_small_volume_is_detected_before_writing(
    make_checkpoint: MakeCheckpoint, job: PrepareJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(job.log.parent)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _path: usage)
    status, message = job.run(make_checkpoint())
    assert (status, message["reason"]) == (1, "NoSpace")
    assert message["message"].startswith("store: got 1000 bytes free in")
    assert not list(job.store.rglob("*.safetensors*"))


def test_unexpected_exception_is_reported_and_reraised(
    make_checkpoint: MakeCheckpoint, job: PrepareJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("layer")

    monkeypatch.setattr("faasmoe_router.checkpoint.prepare.prepare", broken)
    with pytest.raises(KeyError):
        job.run(make_checkpoint())
    assert json.loads(job.log.read_text()) == {
        "ok": False,
        "reason": "Failed",
        "message": "KeyError: 'layer'",
    }


def test_unwritable_termination_log_is_an_error(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = str(tmp_path / "no" / "log")
    store = str(tmp_path / "store")
    assert main(["prepare", str(make_checkpoint()), store, "--termination-log", log]) == 1
    assert "No such file or directory" in capsys.readouterr().err


@contextmanager
def hub_responding(
    monkeypatch: pytest.MonkeyPatch, status: int, headers: Mapping[str, str]
) -> Iterator[None]:
    """Run a fake hub that sends the same response to every request."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(
                "huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}"
            )
            yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def _no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("_no_cache")
@pytest.mark.parametrize(
    ("status", "headers", "reason", "text"),
    [
        (404, {"X-Error-Code": "RepoNotFound"}, "SourceNotFound", "no such repository"),
        (404, {"X-Error-Code": "RevisionNotFound"}, "SourceNotFound", "no such revision"),
        (401, {}, "HubUnauthorized", "the hub answered 401"),
        (403, {"X-Error-Code": "GatedRepo"}, "HubUnauthorized", "access is gated"),
        (
            401,
            {"X-Error-Message": "Invalid credentials in Authorization header"},
            "HubUnauthorized",
            "the hub answered 401: HF_TOKEN is wrong",
        ),
        (403, {}, "HubUnauthorized", "the hub answered 403"),
        (410, {}, "HubUnavailable", "the hub answered 410"),
    ],
)
def test_hub_response_determines_the_reason(
    status: int,
    headers: Mapping[str, str],
    reason: str,
    text: str,
    job: PrepareJob,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with hub_responding(monkeypatch, status, headers):
        code, message = job.run("hf://org/name")
    assert (code, message["reason"]) == (1, reason), message
    assert text in message["message"]


@pytest.mark.usefixtures("_no_cache")
def test_unreachable_hub_is_unavailable(job: PrepareJob, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # does not listen
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        status, message = job.run("hf://org/name")
    assert (status, message["reason"]) == (1, "HubUnavailable")
    assert "cannot be reached" in message["message"]


@pytest.mark.usefixtures("_no_cache")
def test_a_hub_that_never_answers_is_asked_once(
    job: PrepareJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its client would retry for minutes, in which nobody is told."""
    monkeypatch.setattr("faasmoe_router.checkpoint.hub.HUB_TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        status, message = job.run("hf://org/name")
        assert (status, message["reason"]) == (1, "HubUnavailable")
        assert "cannot be reached" in message["message"]
        silent.setblocking(False)
        connection, _ = silent.accept()
        connection.close()
        with pytest.raises(BlockingIOError):
            silent.accept()


def _manifest(layers: list[LayerEntry]) -> Manifest:
    files = {f"experts/{layer.index:05}.safetensors": FileEntry(1, "0" * 64) for layer in layers}
    model = ModelEntry("hf://org/name", COMMIT, "tiny", "Tiny", "bfloat16", 4, 10, 64, len(layers))
    return Manifest.create(model=model, layers=tuple(layers), files=files)


def _layer(index: int, n_experts: int) -> LayerEntry:
    file = f"experts/{index:05}.safetensors"
    digests = ("0" * 32,) * (n_experts + 1)
    return LayerEntry(
        index, f"l{index}", file, n_experts, 2, 4, "Experts", None, 1 << 24, 0, digests
    )


def test_equal_consecutive_layers_are_grouped() -> None:
    n_experts = [60] * 500 + [30] + [60] * 499
    manifest = _manifest([_layer(index, n) for index, n in enumerate(n_experts)])
    assert [group["count"] for group in model_status(manifest)["layers"]] == [500, 1, 499]
    assert len(success_message(manifest)) < 1024


def test_message_above_the_size_limit_is_rejected() -> None:
    manifest = _manifest([_layer(index, 8 + index % 2) for index in range(94)])
    with pytest.raises(SourceUnsupported, match=r"got 94 MoE layers in 94 runs .*at most 4096"):
        success_message(manifest)
    fewer_layers = replace(manifest, layers=manifest.layers[:40])
    assert len(success_message(fewer_layers)) <= MAX_TERMINATION_MESSAGE_BYTES


@pytest.mark.parametrize("text", ["x" * 10_000, "é" * 10_000, "\x00" * 10_000, "\ud800" * 5000])
def test_long_error_text_is_truncated(text: str) -> None:
    content = failure_message(PrepareError(text))
    assert len(content) <= MAX_TERMINATION_MESSAGE_BYTES
    assert json.loads(content)["reason"] == "Failed"


def test_full_disk_is_found_in_the_cause_chain() -> None:
    error = PrepareError("store: cannot be written")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert failure_reason(error) == "NoSpace"
    assert failure_reason(PrepareError("store: cannot be written")) == "Failed"


def test_complete_store_is_verified_without_a_termination_log(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint()
    prepare(str(checkpoint), tmp_path / "store")
    assert main(["prepare", str(checkpoint), str(tmp_path / "store")]) == 0
