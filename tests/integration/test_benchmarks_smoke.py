"""Smoke tests of the benchmarks on a tiny model; the measured figures are meaningless."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from vllm_runs import NEEDS_VLLM

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 240
BATCHES = {"1", "8", "32"}


def _run_module(*arguments: str) -> str:
    finished = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, timeout=TIMEOUT_S, capture_output=True, text=True
    )
    assert finished.returncode == 0, f"{finished.stdout}\n{finished.stderr}"
    return finished.stdout


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """Output and figures of the quick data-plane benchmark."""
    folder = tmp_path_factory.mktemp("bench")
    options = ("--quick", "--profile", "--cache", str(folder), "--out", str(folder))
    printed = _run_module("-m", "benchmarks.data_plane", *options)
    return printed, json.loads((folder / "data_plane.json").read_text())


def test_data_plane_figures_are_complete(
    comparison: tuple[str, dict[str, Any]],
) -> None:
    _, figures = comparison
    assert figures["fanout_p50_us"] > 0
    assert figures["memory_over_floor"] > 1
    for name in ("decode_ratio", "cpu_ratio", "calls_per_token"):
        assert set(figures[name]) == BATCHES
        assert all(value > 0 for value in figures[name].values())


def test_data_plane_makes_one_call_per_function_and_step(
    comparison: tuple[str, dict[str, Any]],
) -> None:
    _, figures = comparison
    functions = 2 * 3  # layers, blocks of 3 of 8 experts
    for batch, calls in figures["calls_per_token"].items():
        assert 1 <= calls * int(batch) <= functions


def test_data_plane_systems_generate_the_same_tokens(
    comparison: tuple[str, dict[str, Any]],
) -> None:
    _, figures = comparison
    for batch in figures["batches"].values():
        assert batch["equal_first_tokens"] > 0.9


def test_parts_of_a_step_sum_to_the_step(comparison: tuple[str, dict[str, Any]]) -> None:
    _, figures = comparison
    for parts in figures["profile_ms"].values():
        whole = parts.pop("whole step")
        spent = sum(ms for name, ms in parts.items() if not name.startswith("CPU of"))
        assert spent == pytest.approx(whole)


def test_data_plane_prints_tables(comparison: tuple[str, dict[str, Any]]) -> None:
    printed, _ = comparison
    for line in ("decode ratio", "CPU ratio", "calls per token", "ours, total", "MS PER STEP"):
        assert line in printed


def test_benchmark_launcher_does_not_import_torch() -> None:
    # Its memory counts as FaaSMoE's, and the launcher of `faasmoe up` does not import torch.
    program = "import sys, benchmarks.data_plane; print('torch' in sys.modules)"
    assert _run_module("-c", program).strip() == "False"


@pytest.mark.slow
def test_fanout_measures_every_candidate(tmp_path: Path) -> None:
    printed = _run_module("-m", "benchmarks.fanout", "--quick", "--out", str(tmp_path))
    figures = json.loads((tmp_path / "fanout.json").read_text())
    assert figures["fanout_p50_us"] > 0
    assert {found["body_bytes"] >> 10 for found in figures["candidates"]} == {8, 64, 256, 1024}
    assert "uvicorn" in printed


def test_quantisation_figures_of_functions_are_complete(tmp_path: Path) -> None:
    options = ("--quick", "--only", "functions")
    folders = ("--cache", str(tmp_path), "--out", str(tmp_path))
    printed = _run_module("-m", "benchmarks.quantization", *options, *folders)
    functions = json.loads((tmp_path / "quantization.json").read_text())["functions"]
    sizes = [functions[scheme]["function_bytes"] for scheme in ("none", "int8", "int4")]
    assert sizes == sorted(sizes, reverse=True)
    for found in functions.values():
        assert found["first_attach_ms"]["median"] > 0
        assert found["memory_over_weights"] == found["memory_bytes"] / found["weight_bytes"]
    assert "MEMORY / WEIGHTS" in printed


@pytest.mark.slow
def test_elastic_figures_are_complete(tmp_path: Path) -> None:
    options = ("--quick", "--cache", str(tmp_path), "--out", str(tmp_path))
    printed = _run_module("-m", "benchmarks.elastic", *options)
    figures = json.loads((tmp_path / "elastic.json").read_text())
    for name in ("attach", "cold_start"):
        assert 0 < figures[f"{name}_p50_s"] <= figures[f"{name}_p99_s"]
        assert f"{name}_p50_s" in printed
    for name in ("ttft_after_idle_ratio", "private_mb_per_function", "memory_over_floor"):
        assert figures[name] > 0
    assert figures["idle_sandboxes"] == {"0": 0, "2": 2}
    assert figures["machine"]["cores"] > 0


@pytest.mark.parametrize("engine", [pytest.param("vllm", marks=NEEDS_VLLM)])
def test_cache_of_vllms_engine_takes_no_memory_before_it_is_used(
    engine: str, tmp_path: Path
) -> None:
    options = ("--quick", "--memory", "--engine", engine)
    _run_module(
        "-m", "benchmarks.elastic", *options, "--cache", str(tmp_path), "--out", str(tmp_path)
    )
    figures = json.loads((tmp_path / "elastic_memory_vllm.json").read_text())
    assert figures["engine"] == engine
    router_mb = figures["memory"]["all_warm"]["beyond_weights_mb"]["router"]
    assert 0 < router_mb < 2048  # the KV cache may have 2 GiB


@pytest.mark.slow
def test_fairness_figures_are_complete(tmp_path: Path) -> None:
    printed = _run_module(
        "-m", "benchmarks.fairness", "--quick", "--cache", str(tmp_path), "--out", str(tmp_path)
    )
    figures = json.loads((tmp_path / "fairness.json").read_text())
    assert figures["quiet_p99_ratio"] > 0
    assert 1 / 6 < figures["jain"] <= 1
    assert figures["refused"] == 0
    for name in ("quiet_p99_ratio", "fifo_quiet_p99_ratio", "jain"):
        assert name in printed


@pytest.mark.slow
def test_cuda_benchmark_runs_on_cpu(tmp_path: Path) -> None:
    options = ("--quick", "--device", "cpu", "--cache", str(tmp_path), "--out", str(tmp_path))
    printed = _run_module("-m", "benchmarks.cuda", *options)
    figures = json.loads((tmp_path / "cuda.json").read_text())
    assert (figures["failures"], figures["left_out"]) == ({}, [])
    functions = {variant["name"] for variant in figures["variants"]}
    assert {"functions_on_device", "functions_on_cpu"} < functions
    assert figures["sides"].keys() == {"in_process", *functions}
    assert figures["throughput_ratio"].keys() == figures["shares"].keys() == functions
    for side in functions:
        assert figures["shares"][side].keys() == {"1", "8"}
        for shares in figures["shares"][side].values():
            assert sum(shares.values()) == pytest.approx(1.0)
    for by_batch in figures["sides"].values():
        for found in by_batch.values():
            assert all(found[name]["median"] > 0 for name in ("tokens_per_s", "tpot_ms", "ttft_ms"))
    assert figures["attach"]["cpu"]["attach_s"]["median"] > 0
    assert figures["transports_us"].keys() == {"sockets", "shared memory"}
    assert "VS IN-PROCESS" in printed
    assert "US PER ROUND TRIP" in printed


def test_cuda_benchmark_reports_missing_gpu(tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks.cuda", "--quick", "--out", str(tmp_path)],
        cwd=ROOT,
        timeout=TIMEOUT_S,
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert finished.returncode == 2
    assert finished.stderr.startswith(
        "benchmarks.cuda: --device: got 'cuda', expected cpu or auto: "
    )
    assert list(tmp_path.iterdir()) == []


def test_tls_figures_are_complete(tmp_path: Path) -> None:
    printed = _run_module(
        "-m", "benchmarks.tls", "--quick", "--cache", str(tmp_path), "--out", str(tmp_path)
    )
    figures = json.loads((tmp_path / "tls.json").read_text())
    assert "CPU ADDED BY TLS" in printed
    for transport in ("plain", "tls"):
        calls = figures["calls"][transport]
        assert calls.keys() == figures["added_cpu_ms"].keys()
        assert all(part["median"] > 0 for call in calls.values() for part in call.values())
