import json
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from faasmoe_contracts.store import QuantizationEntry, TensorQuantization, manifest_digest
from faasmoe_operator.cli import checkpoint, main

WriteModel = Callable[..., Path]


@pytest.mark.parametrize(
    "command",
    [
        "up",
        "top",
        "chat",
        "explain",
        "doctor",
        "plan",
        "prepare",
        "demo-model",
        "bench",
        "crd",
        "version",
    ],
)
def test_prints_help_of_each_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as finished:
        main([command, "--help"])
    assert finished.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: faasmoe {command}")


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param([], id="no-command"),
        pytest.param(["dance"], id="unknown-command"),
        pytest.param(["up", "-f", "x", "--port", "70000"], id="port-too-high"),
        pytest.param(["up", "-f", "x", "--port", "0"], id="port-zero"),
        pytest.param(["prepare"], id="no-checkpoint"),
        pytest.param(["up", "x", "--experts-per-function", "few"], id="experts-per-function"),
        pytest.param(["top", "--interval", "0"], id="no-interval"),
    ],
)
def test_rejects_invalid_arguments(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as finished:
        main(arguments)
    assert finished.value.code == 2
    assert "usage: faasmoe" in capsys.readouterr().err


def test_prints_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert capsys.readouterr().out.startswith("faasmoe ")


@pytest.mark.parametrize("command", ["up", "plan"])
def test_reports_missing_file(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "-f", str(tmp_path / "none.yaml")]) == 2
    error = capsys.readouterr().err
    assert "none.yaml: cannot be read" in error
    assert "Traceback" not in error


def test_reports_invalid_field(write_model: WriteModel, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "-f", str(write_model("granularity: {expertsPerFunction: 0}"))]) == 2
    error = capsys.readouterr().err
    assert "model.yaml: spec.granularity.expertsPerFunction: got 0, expected 1 or more" in error


def test_rejects_port_in_use_before_starting_processes(
    write_model: WriteModel, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["up", "-f", str(write_model()), "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in error
    assert "starting" not in error


def test_plan_shows_functions_sandboxes_and_memory(
    write_model: WriteModel, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_model("granularity: {expertsPerFunction: 3}", "experts: {functionsPerSandbox: 2}")
    assert main(["plan", "-f", str(file)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "functions 6, 16.0 MiB of weights" in lines
    assert "sandboxes up to 2 functions each, 1 generic kept ready" in lines
    assert "router up to 0 B of weights, float32 on a CPU without fast bfloat16" in lines
    assert "idle 1 sandboxes, about 166.0 MiB" in lines
    assert "all active 4 sandboxes, about 200.0 MiB including weights" in lines
    assert "0-2 1 2 3.0 MiB" in lines
    assert "6-7 1 2 2.0 MiB" in lines


@pytest.mark.parametrize(
    ("router", "weights"),
    [
        ("{}", "up to 6.0 MiB of weights, float32 on a CPU without fast bfloat16"),
        ("{device: cpu}", "up to 6.0 MiB of weights, float32 on a CPU without fast bfloat16"),
        ("{device: cuda}", "3.0 MiB of weights"),
        ("{dtype: bfloat16}", "3.0 MiB of weights"),
        ("{dtype: float32}", "6.0 MiB of weights, float32"),
    ],
)
def test_plan_counts_router_weights_in_the_routers_dtype(
    router: str,
    weights: str,
    write_model: WriteModel,
    store: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    manifest = json.loads((store / "manifest.json").read_text())
    manifest["files"]["router/router.safetensors"] = {
        "size_bytes": 3 << 20,
        "sha256": "0" * 64,
    }
    manifest["digest"] = manifest_digest(manifest)
    (store / "manifest.json").write_text(json.dumps(manifest))
    (store / "router").mkdir()
    (store / "router" / "router.safetensors").write_bytes(bytes(3 << 20))
    assert main(["plan", "-f", str(write_model(f"router: {router}"))]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert f"router {weights}" in lines


def test_plan_counts_quantised_router_weights_as_they_are(
    write_model: WriteModel, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads((store / "manifest.json").read_text())
    manifest["files"]["router/router.safetensors"] = {"size_bytes": 3 << 20, "sha256": "0" * 64}
    manifest["quantization"] = {"experts": "none", "router": "int8"}
    entry = TensorQuantization("int8", (1024, 1024), 0, "bfloat16")
    manifest["router"] = {"quantized": {"lm_head": entry.to_json()}}
    manifest["digest"] = manifest_digest(manifest)
    (store / "manifest.json").write_text(json.dumps(manifest))
    (store / "router").mkdir()
    (store / "router" / "router.safetensors").write_bytes(bytes(3 << 20))
    file = write_model("router: {quantization: int8, dtype: float32}")
    assert main(["plan", "-f", str(file)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "quantization experts none, router int8" in lines
    assert "router 5.0 MiB of weights, float32" in lines  # 1 MiB of codes, 2 MiB of bfloat16


def test_plan_requires_store(write_model: WriteModel, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "-f", str(write_model())]) == 2
    assert "spec.store.path: got " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spec", "source", "problem"),
    [
        pytest.param(
            "granularity: {expertsPerFunction: 9}",
            "file://checkpoint",
            "model.yaml: spec.granularity.expertsPerFunction: got 9, expected at most 8, "
            "the experts of layer 0",
            id="granularity",
        ),
        pytest.param(
            "router: {maxModelLen: 65}",
            "file://checkpoint",
            "spec.router.maxModelLen: got 65, expected at most 64, the model's context",
            id="context",
        ),
        pytest.param(
            "router: {}",
            "file://another",
            "another, expected file:///",
            id="store-of-another-folder",
        ),
        pytest.param(
            "router: {}",
            "hf://org/model",
            "spec.model.source: got hf://org/model, expected file:///",
            id="store-of-a-folder-for-a-hub-model",
        ),
        pytest.param(
            "router: {}",
            "file://checkpoint', dtype: 'float32",
            "spec.model.dtype: got float32, expected auto or bfloat16",
            id="store-of-another-dtype",
        ),
        pytest.param(
            "experts: {quantization: int8}",
            "file://checkpoint",
            "spec.experts.quantization: got int8, expected none, which the store ",
            id="store-of-other-experts",
        ),
        pytest.param(
            "router: {quantization: int4}",
            "file://checkpoint",
            "spec.router.quantization: got int4, expected none, which the store ",
            id="store-of-another-router",
        ),
        pytest.param(
            "experts: {quantization: int3}",
            "file://checkpoint",
            "spec.experts.quantization: got 'int3', expected 'none', 'int8', 'int4' or 'mxfp4'",
            id="unknown-quantization",
        ),
    ],
)
def test_rejects_store_that_does_not_match_spec(
    write_model: WriteModel,
    store: Path,
    capsys: pytest.CaptureFixture[str],
    spec: str,
    source: str,
    problem: str,
) -> None:
    assert main(["plan", "-f", str(write_model(spec, source=source))]) == 2
    assert problem in capsys.readouterr().err


def test_reports_file_missing_from_store(
    write_model: WriteModel, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (store / "layer1.safetensors").unlink()
    assert main(["plan", "-f", str(write_model())]) == 1
    assert "layer1.safetensors: cannot be read" in capsys.readouterr().err


def test_prepare_command_forwards_arguments(tmp_path: Path) -> None:
    command = checkpoint.prepare_command(
        str(tmp_path), "store", revision="main", dtype="float32", force=True
    )
    assert command[-5:] == [
        tmp_path.as_uri(),
        "store",
        "--revision=main",
        "--dtype=float32",
        "--force",
    ]
    quantization = QuantizationEntry("mxfp4", "int8")
    quantized = checkpoint.prepare_command(
        "hf://org/model", "store", revision=None, dtype=None, quantization=quantization
    )
    assert quantized[-2:] == ["--quantize=mxfp4", "--quantize-router=int8"]
    shared = checkpoint.prepare_command(
        "hf://org/model", "store", revision=None, dtype=None, share_with=["a", tmp_path]
    )
    assert shared[-2:] == ["--share-with=a", f"--share-with={tmp_path}"]
    hub = checkpoint.prepare_command("hf://org/model", "store", revision=None, dtype=None)
    assert hub[-2:] == ["hf://org/model", "store"]


def test_prepare_shares_with_the_cache_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    commands: list[Sequence[str]] = []

    def run(command: Sequence[str]) -> int:
        commands.append(command)
        return 3

    monkeypatch.setattr(checkpoint, "run_in_foreground", run)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    model, stores = str(tmp_path / "model"), tmp_path / "cache" / "faasmoe" / "stores"
    for arguments, expected in (
        ([], [f"--share-with={stores}"]),
        (["--no-sharing"], []),
        (["--share-with", "other"], ["--share-with=other"]),
        (["store"], []),
        (["store", "--share-with", "a", "--share-with", "b"], ["--share-with=a", "--share-with=b"]),
    ):
        assert main(["prepare", model, *arguments]) == 3
        assert [word for word in commands[-1] if word.startswith("--share")] == expected
    assert main(["prepare", model, "--no-sharing", "--share-with", "a"]) == 2
    assert "expected --share-with or --no-sharing, got both" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "status"),
    [("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 15)", 143)],
)
def test_returns_exit_status_of_child(
    script: str, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "COMMAND", (sys.executable, "-c", script))
    assert main(["demo-model", "somewhere"]) == status
