"""A warmed-up zygote: what it computes and imports, and that its sandboxes work."""

import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from raw_http import request_frame
from sandbox_processes import PreparedStore, make_function_spec, sandbox_env
from zygote_process import DEADLINE_S, ZygoteClient, running_zygote

from faasmoe_contracts.store import Store
from faasmoe_expert.warmup import WARMUP_ROW_COUNTS

ZYGOTE = ("-m", "faasmoe_expert.zygote")


def send_request(method: str, url: str, body: bytes = b"") -> bytes:
    headers = {"Authorization": "Bearer secret"}
    request = urllib.request.Request(url, data=body or None, headers=headers, method=method)
    with urllib.request.urlopen(request, timeout=DEADLINE_S) as response:
        content: bytes = response.read()
        return content


def compute_in_a_sandbox(client: ZygoteClient, store: Store, **config: Any) -> bytes:
    """Fork a sandbox, attach a function and return the response to a frame."""
    address = client.spawn("s1", device="cpu", **config)["address"]
    spec = make_function_spec(store, [0], [0, 1, 2])
    function = f"http://{address}/v1/functions/{spec.id}"
    attachment = {**spec.to_json(), "store": str(store.path), "model_digest": store.manifest.digest}
    send_request("PUT", function, json.dumps(attachment).encode())
    return send_request("POST", function, request_frame(n_rows=40))


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v4"])
def test_warmed_up_zygote_is_single_threaded_and_its_sandboxes_are_not(
    prepared_store: PreparedStore, tmp_path: Path, family: str
) -> None:
    store, output = prepared_store(family), tmp_path / "log"
    variables = {"FAASMOE_WARMUP_STORE": str(store.path), "FAASMOE_DEVICE": "cpu"}
    with running_zygote(*ZYGOTE, output=output, **variables) as zygote, zygote.client() as client:
        # After a parallel region it would have more threads, and its children would hang.
        assert len(list(Path(f"/proc/{zygote.process.pid}/task").iterdir())) == 1
        assert len(compute_in_a_sandbox(client, store, threads=2)) > 32
    assert "warmed up 1 layer kinds" in output.read_text()
    assert "not warmed up" not in output.read_text()


def test_missing_store_is_logged_and_sandboxes_work(
    prepared_store: PreparedStore, tmp_path: Path
) -> None:
    store, output = prepared_store("mixtral"), tmp_path / "log"
    variables = {"FAASMOE_WARMUP_STORE": str(tmp_path / "none"), "FAASMOE_DEVICE": "cpu"}
    with running_zygote(*ZYGOTE, output=output, **variables) as zygote, zygote.client() as client:
        assert len(compute_in_a_sandbox(client, store)) > 32
    assert "warm-up skipped" in output.read_text()


SCRIPT = """
import sys
from pathlib import Path
from faasmoe_expert.config import SandboxConfig
from faasmoe_expert.functions.function import ExpertFunction
from faasmoe_expert.warmup import warm_up

computed, compute_batch = [], ExpertFunction.compute_batch
def recording_compute_batch(self, requests):
    computed.extend((r.header.layer, r.header.n_rows) for r in requests)
    return compute_batch(self, requests)
ExpertFunction.compute_batch = recording_compute_batch
warm_up(SandboxConfig(device=sys.argv[2], token="secret"), Path(sys.argv[1]))
print(computed, "transformers" in sys.modules)
"""


def run_warmup(store: Store, *, device: str) -> str:
    """Return the (layer, n_rows) of all warm-up frames and whether transformers was imported."""
    command = [sys.executable, "-c", SCRIPT, str(store.path), device]
    environment = {**sandbox_env(), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "not warmed up" not in run.stderr
    return run.stdout.strip()


def test_warms_up_each_layer_kind_with_each_row_count(
    prepared_store: PreparedStore,
) -> None:
    frames = [(0, n + 1) for n in WARMUP_ROW_COUNTS]  # all layers are of one kind
    assert run_warmup(prepared_store("mixtral"), device="cpu") == f"{frames} False"


def test_imports_transformers_for_families_without_a_gated_kernel(
    prepared_store: PreparedStore,
) -> None:
    store = prepared_store("deepseek_v4")
    assert store.manifest.layers[0].kernel is None
    assert run_warmup(store, device="cpu").endswith("True")


def test_skips_warm_up_for_sandboxes_on_a_gpu(
    prepared_store: PreparedStore,
) -> None:
    assert run_warmup(prepared_store("mixtral"), device="cuda") == "[] False"


def test_multi_threaded_zygote_exits_with_an_error(
    prepared_store: PreparedStore, tmp_path: Path
) -> None:
    output = tmp_path / "log"
    variables = {
        "FAASMOE_WARMUP_STORE": str(prepared_store("mixtral").path),
        "FAASMOE_DEVICE": "cpu",
        "OPENBLAS_NUM_THREADS": "2",  # numpy's OpenBLAS starts a thread on import
    }
    with running_zygote(*ZYGOTE, output=output, **variables) as zygote:
        assert zygote.process.wait(DEADLINE_S) == 2
    assert "warm-up: got 2 threads after warm-up, expected one" in output.read_text()
