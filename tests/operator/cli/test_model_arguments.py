import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from faasmoe_operator.cli import main
from faasmoe_operator.cli.command import build_parser
from faasmoe_operator.cli.model_arguments import RequestedModel, load_model
from faasmoe_operator.cli.stack_files import write_model_file
from faasmoe_operator.control.local_model import LocalModel
from faasmoe_operator.errors import FaasmoeError

WriteModel = Callable[..., Path]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def load(*words: str | Path) -> RequestedModel:
    return load_model(build_parser().parse_args(["up", *map(str, words)]))


def spec(requested: RequestedModel) -> dict[str, Any]:
    model = requested.deployment.model
    document: dict[str, Any] = model.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return dict(document["spec"])


def test_a_model_alone_has_the_defaults_of_a_file() -> None:
    requested = load("org/Name")
    deployment = requested.deployment
    assert spec(requested) == {
        "model": {"source": "hf://org/Name"},
        "store": {"path": str(deployment.store_path)},
        "router": {"servedModelName": "org/Name"},
    }
    assert deployment.model.metadata.name == "name"
    assert requested.cached is not None
    assert deployment.store_path == requested.cached.path


def test_every_option_sets_its_field() -> None:
    requested = load(
        "org/Name",
        *("--revision", "v1", "--dtype", "float16", "--quantization", "int4"),
        *("--quantize-router", "int8", "--experts-per-function", "7", "--max-model-len", "99"),
        *("--served-model-name", "me/x"),
    )
    fields = spec(requested)
    del fields["store"]
    assert fields == {
        "model": {"source": "hf://org/Name", "revision": "v1", "dtype": "float16"},
        "granularity": {"expertsPerFunction": 7},
        "experts": {"quantization": "int4"},
        "router": {"servedModelName": "me/x", "maxModelLen": 99, "quantization": "int8"},
    }


def test_options_override_the_fields_of_a_file(write_model: WriteModel, tmp_path: Path) -> None:
    file = write_model(
        "granularity: auto", "router: {maxModelLen: 8, maxNumSeqs: 3}", source="file://some/where"
    )
    requested = load("-f", file, "--max-model-len", "16", "--experts-per-function", "auto")
    assert requested.cached is None
    assert spec(requested)["router"] == {"maxModelLen": 16, "maxNumSeqs": 3}
    (tmp_path / "run").mkdir()
    written = write_model_file(requested.deployment, tmp_path / "run")
    assert LocalModel.load(written).source == (tmp_path / "some" / "where").as_uri()


def test_a_file_without_options_stays_the_file(write_model: WriteModel, tmp_path: Path) -> None:
    file = write_model()
    assert write_model_file(load("-f", file).deployment, tmp_path) == file


def test_a_written_file_has_absolute_paths(write_model: WriteModel, tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    file = write_model("tenants: [{name: acme, apiKeysPath: keys}]")
    deployment = load("-f", file, "--max-model-len", "16").deployment
    (tmp_path / "run").mkdir()
    written = LocalModel.load(write_model_file(deployment, tmp_path / "run"))
    assert written.store_path == deployment.store_path == tmp_path / "store"
    assert written.source == deployment.source
    (tenant,) = written.model.spec.tenants
    assert written.api_keys_path(tenant) == tmp_path / "keys"
    assert written.model.spec.router.max_model_len == 16


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ([], "expected MODEL or -f FILE, got neither"),
        (["org/name", "-f", "x.yaml"], "expected MODEL or -f FILE, got MODEL 'org/name' and -f x"),
        (["org/name", "--max-model-len", "0"], "org/name: --max-model-len: got 0, expected 1"),
        (["org/name", "--experts-per-function", "0"], "org/name: --experts-per-function: got 0"),
        (["org/name", "--served-model-name", "a b"], "--served-model-name: got 'a b', expected le"),
        (["org/name", "--revision", ""], "org/name: --revision: got ''"),
    ],
)
def test_bad_input_is_named_by_its_option(words: list[str], problem: str) -> None:
    with pytest.raises(FaasmoeError) as raised:
        load(*words)
    assert problem in str(raised.value)
    assert "spec." not in str(raised.value)


def test_an_override_of_a_file_is_named_by_its_option(write_model: WriteModel) -> None:
    with pytest.raises(FaasmoeError, match=r"model\.yaml: --max-model-len: got 0, expected 1"):
        load("-f", write_model(), "--max-model-len", "0")


def test_a_folder_has_no_revision(checkpoint: Path) -> None:
    with pytest.raises(FaasmoeError, match="--revision: got 'v1', expected none for /"):
        load(checkpoint, "--revision", "v1")


@pytest.fixture
def cached(checkpoint: Path, store: Path) -> Path:
    """A prepared store of the checkpoint in the cache."""
    requested = load(checkpoint)
    assert requested.cached is not None
    shutil.copytree(store, requested.cached.path)
    return requested.cached.path


@pytest.mark.usefixtures("cached")
def test_plan_of_a_model_shows_its_store(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(checkpoint), "--experts-per-function", "4"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "functions 4, 16.0 MiB of weights" in lines
    assert "sandboxes up to 2 functions each, 1 generic kept ready" in lines  # 2 for 2 layers
    assert f"source {checkpoint.as_uri()}" in lines


@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--experts-per-function", "9"], "--experts-per-function: got 9, expected at most 8"),
        (["--quantization", "int8"], "checkpoint: store: got "),
    ],
)
def test_what_the_store_cannot_do_is_named_by_the_option(
    checkpoint: Path, words: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(checkpoint), *words]) == 2
    assert problem in capsys.readouterr().err


def test_up_names_the_option_that_exceeds_the_context(
    checkpoint: Path, cached: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    requested = load(checkpoint)
    assert requested.cached is not None
    requested.cached.write_stamp(requested.cached.stamp())
    manifest = json.loads((cached / "manifest.json").read_text())
    limit = manifest["model"]["max_position_embeddings"]
    assert main(["up", str(checkpoint), "--max-model-len", str(limit + 1), "--port", "47113"]) == 2
    error = capsys.readouterr().err
    assert f"--max-model-len: got {limit + 1}, expected at most {limit}" in error
