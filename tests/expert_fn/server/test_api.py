"""Attaching, detaching, listing and computing over HTTP; what is refused, and by which field."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from families.registry import FAMILIES, experts_modules
from raw_http import TOKEN, request_frame
from sandbox_processes import PreparedStore, SandboxProcess, StartSandbox, make_function_spec

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_contracts.store import Store, manifest_digest
from faasmoe_contracts.wire import Dtype, OutputMode, decode_request, decode_response
from faasmoe_expert.server.http import FRAME_CONTENT_TYPE


@pytest.fixture
def fresh(sandbox: StartSandbox) -> Iterator[SandboxProcess]:
    """A sandbox of its own: generic, for two functions."""
    with sandbox(token=TOKEN, capacity=2, sandbox_id="s7") as fresh:
        yield fresh


def body(store: Store, spec: FunctionSpec, /, **changes: Any) -> dict[str, Any]:
    value = {
        "store": str(store.path),
        "model_digest": store.manifest.digest,
        "layers": list(spec.layers),
        "experts": list(spec.experts),
        **changes,
    }
    return {name: v for name, v in value.items() if v is not ...}


def put_function(sandbox_server: SandboxProcess, spec: FunctionSpec, value: Any) -> httpx.Response:
    return sandbox_server.http.put(f"/v1/functions/{spec.id}", json=value)


def error_of(answer: httpx.Response) -> dict[str, str]:
    error: dict[str, str] = answer.json()["error"]
    assert set(error) == {"code", "message", "field"}
    return error


def test_a_sandbox_attaches_lists_computes_and_detaches(
    fresh: SandboxProcess, store: Store, spec: FunctionSpec
) -> None:
    assert fresh.http.get("/v1/functions").json() == {
        "sandbox": {
            "id": "s7",
            "pid": fresh.process.pid,
            "capacity": 2,
            "device": "cpu",
            "memory": {"limit_bytes": None, "used_bytes": 0},
        },
        "functions": [],
    }
    first = put_function(fresh, spec, body(store, spec))
    listed = {
        "id": spec.id,
        "layers": [0],
        "experts": [0, 1, 2],
        "model_digest": store.manifest.digest,
        "size_bytes": 3 * store.manifest.layers[0].expert_bytes,
        "frames": 0,
    }
    assert (first.status_code, first.json()) == (201, listed)
    assert fresh.http.get("/v1/functions").json()["functions"] == [listed]
    assert fresh.http.post(f"/v1/functions/{spec.id}", content=request_frame()).status_code == 200
    detached = fresh.http.delete(f"/v1/functions/{spec.id}")
    assert (detached.status_code, detached.content) == (204, b"")
    assert "content-length" not in detached.headers
    assert fresh.http.get("/v1/functions").json()["functions"] == []
    maps = Path(f"/proc/{fresh.process.pid}/maps").read_text()
    assert str(store.path) not in maps


def test_attaching_again_changes_nothing(
    sandbox_server: SandboxProcess, store: Store, spec: FunctionSpec
) -> None:
    before = sandbox_server.http.get("/v1/functions").json()
    again = put_function(sandbox_server, spec, body(store, spec))
    assert (again.status_code, again.json()) == (200, before["functions"][0])
    assert sandbox_server.http.get("/v1/functions").json() == before


@pytest.mark.parametrize(
    "change", [{"experts": [0, 1]}, {"layers": [0, 1]}, {"model_digest": "sha256:other"}]
)
def test_an_id_never_changes_its_meaning(
    sandbox_server: SandboxProcess, store: Store, spec: FunctionSpec, change: dict[str, Any]
) -> None:
    answer = put_function(sandbox_server, spec, body(store, spec, **change))
    assert (answer.status_code, error_of(answer)["field"]) == (409, "id")
    assert error_of(answer)["code"] == "attach_refused"


def test_a_full_sandbox_refuses_and_then_takes_a_place_that_became_free(
    fresh: SandboxProcess, store: Store
) -> None:
    one, two, three = (make_function_spec(store, [layer], [0]) for layer in range(3))
    fresh.attach(store, one)
    fresh.attach(store, two)
    refused = put_function(fresh, three, body(store, three))
    assert (refused.status_code, error_of(refused)["field"]) == (409, "capacity")
    assert put_function(fresh, two, body(store, two)).status_code == 200
    fresh.http.delete(f"/v1/functions/{one.id}")
    assert put_function(fresh, three, body(store, three)).status_code == 201


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("mode", OutputMode)
def test_a_frame_is_answered_with_what_the_experts_make_of_it(
    fresh: SandboxProcess, prepared_store: PreparedStore, family: str, mode: OutputMode
) -> None:
    store = prepared_store(family)
    spec = make_function_spec(store, [1], [2, 5])
    fresh.attach(store, spec)
    hidden = torch.ones(2, 32)  # [T, H]
    pairs = np.array([0, 0, 1], dtype=np.int32), np.array([5, 2, 5], dtype=np.int32)
    weights = np.array([0.5, 2.0, 1.0], dtype=np.float32)
    sent = request_frame(
        layer=1, mode=mode, pair_row=pairs[0], pair_expert=pairs[1], pair_weight=weights
    )
    answer = fresh.http.post(f"/v1/functions/{spec.id}", content=sent)
    assert answer.headers["content-type"] == FRAME_CONTENT_TYPE
    outputs = decode_response(answer.content, decode_request(sent).header)
    got = torch.frombuffer(bytearray(outputs), dtype=torch.float32).view(-1, 32)
    module = list(experts_modules(next(f for f in FAMILIES if f.name == family).build()).values())
    index, weight = torch.tensor([[5], [2], [5]]), torch.from_numpy(weights)[:, None]
    expected = module[1](hidden[[0, 0, 1]], index, weight).detach()  # [P, H]
    if mode is OutputMode.REDUCED:
        expected = torch.stack((expected[0] + expected[1], expected[2]))  # [T, H]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        pytest.param({"store": ...}, "store", id="store missing"),
        pytest.param({"store": 7}, "store", id="store of another type"),
        pytest.param({"store": ""}, "store", id="store empty"),
        pytest.param({"store": "/nowhere"}, "store", id="store not there"),
        pytest.param({"store": "/no\0where"}, "store", id="store with a zero byte"),
        pytest.param({"store": "/\ud800"}, "store", id="store with half a character"),
        pytest.param({"store": "/" + "x" * 5000}, "store", id="store of a long name"),
        pytest.param({"store": "/dev/null"}, "store", id="store no folder"),
        pytest.param({"model_digest": ...}, "model_digest", id="digest missing"),
        pytest.param({"model_digest": "sha256:00"}, "model_digest", id="another model"),
        pytest.param({"layers": ...}, "layers", id="layers missing"),
        pytest.param({"layers": []}, "layers", id="no layers"),
        pytest.param({"layers": [3]}, "layers", id="layer too high"),
        pytest.param({"layers": ["0"]}, "layers", id="layer of another type"),
        pytest.param({"experts": [8]}, "experts", id="expert too high"),
        pytest.param({"experts": [-1]}, "experts", id="expert negative"),
        pytest.param({"experts": [2, 1]}, "experts", id="experts not ascending"),
        pytest.param({"experts": {"0": 1}}, "experts", id="experts of another type"),
        pytest.param({"id": "f1"}, "id", id="id of another function"),
        pytest.param({"expert": [0]}, "expert", id="unknown field"),
        pytest.param({"x" * 100_000: 1}, "x" * 80, id="unknown field of a long name"),
        pytest.param({"store": "/" + "x" * 100_000}, "store", id="store too long"),
        pytest.param({"store": ["x" * 100_000]}, "store", id="store a long list"),
        pytest.param({"model_digest": "x" * 100_000}, "model_digest", id="digest too long"),
        pytest.param({"experts": list(range(9_999, 0, -1))}, "experts", id="many experts"),
    ],
)
def test_a_bad_attachment_is_refused_by_its_field(
    sandbox_server: SandboxProcess, store: Store, change: dict[str, Any], field: str
) -> None:
    spec = make_function_spec(store, [1], [0])
    answer = sandbox_server.http.put(
        f"/v1/functions/{spec.id}", content=json.dumps(body(store, spec, **change))
    )
    assert answer.status_code == 422
    assert error_of(answer)["field"] == field
    assert error_of(answer)["message"].startswith(f"{field}: ")
    assert len(answer.content) < 9 << 10  # a path twice, everything else cut
    assert len(sandbox_server.http.get("/v1/functions").json()["functions"]) == 1


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, '{"store": ""}'.encode("utf-16")],
)
def test_an_attachment_that_is_no_json_object_is_refused(
    sandbox_server: SandboxProcess, text: bytes
) -> None:
    answer = sandbox_server.http.put("/v1/functions/f1", content=text)
    assert (answer.status_code, error_of(answer)["field"]) == (422, "body")


@pytest.mark.parametrize("function_id", ["a-b", "a" * 65, "a%2Fb", "%00", "\N{SUPERSCRIPT TWO}"])
def test_an_id_of_other_characters_is_refused(
    sandbox_server: SandboxProcess, store: Store, spec: FunctionSpec, function_id: str
) -> None:
    answer = sandbox_server.http.put(f"/v1/functions/{function_id}", json=body(store, spec))
    assert (answer.status_code, error_of(answer)["field"]) == (422, "id")


def damage_missing(path: Path) -> None:
    path.unlink()


def damage_truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def damage_header(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(b"\xff" * 64 + content[64:])


def damage_other_tensors(path: Path) -> None:
    other = path.with_name("00001.safetensors").read_bytes()
    content = other.replace(b'"F32"', b'"F64"')
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage", [damage_missing, damage_truncated, damage_header, damage_other_tensors]
)
def test_a_damaged_store_is_refused_by_its_file(
    sandbox_server: SandboxProcess, store: Store, tmp_path: Path, damage: Any
) -> None:
    copy = Store.open(shutil.copytree(store.path, tmp_path / "store"))
    manifest = json.loads((copy.path / "manifest.json").read_text())
    manifest["files"]["model/extra"] = {"size_bytes": 0, "sha256": "0" * 64}
    digest = _write_manifest(copy.path, manifest)
    damage(copy.path / "experts" / "00000.safetensors")
    spec = make_function_spec(store, [0], [3])
    answer = put_function(sandbox_server, spec, body(copy, spec, model_digest=digest))
    assert (answer.status_code, error_of(answer)["field"]) == (422, "store")
    assert "00000.safetensors" in error_of(answer)["message"]


def test_a_file_truncated_while_its_store_is_used_is_refused(
    fresh: SandboxProcess, store: Store, tmp_path: Path
) -> None:
    copy = Store.open(shutil.copytree(store.path, tmp_path / "store"))
    fresh.attach(copy, make_function_spec(copy, [0], [0]))
    damage_truncated(copy.path / "experts" / "00001.safetensors")
    for layers in ([1], [0, 1]):
        spec = make_function_spec(copy, layers, [1])
        answer = put_function(fresh, spec, body(copy, spec))
        assert (answer.status_code, error_of(answer)["field"]) == (422, "store")
        assert "00001.safetensors: size: got" in error_of(answer)["message"]
    assert len(fresh.http.get("/v1/functions").json()["functions"]) == 1


def test_a_store_is_read_again_once_its_last_function_is_gone(
    fresh: SandboxProcess, store: Store, tmp_path: Path
) -> None:
    copy = Store.open(shutil.copytree(store.path, tmp_path / "store"))
    spec = make_function_spec(copy, [1], [3])
    fresh.attach(store, make_function_spec(store, [0], [0]))  # of the same digest, elsewhere
    fresh.attach(copy, spec)
    (copy.path / "manifest.json").unlink()
    fresh.http.delete(f"/v1/functions/{spec.id}")
    answer = put_function(fresh, spec, body(copy, spec))
    assert (answer.status_code, error_of(answer)["field"]) == (422, "store")
    assert "manifest.json: not there" in error_of(answer)["message"]


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> str:
    """Make the store another model's, which the sandbox has not opened yet."""
    manifest["digest"] = manifest_digest(manifest)
    (folder / "model" / "extra").touch()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return str(manifest["digest"])


@pytest.mark.parametrize(
    ("content", "field"),
    [
        pytest.param(b"", "frame", id="empty"),
        pytest.param(request_frame()[:-1], "frame", id="truncated"),
        pytest.param(b"x" * 100, "magic", id="garbage"),
        pytest.param(request_frame(dtype=Dtype.FLOAT16), "payload_bytes", id="mis-sized"),
        pytest.param(request_frame(dtype=Dtype.BFLOAT16, hidden_size=64), "dtype", id="dtype"),
        pytest.param(request_frame(hidden_size=64, n_rows=1), "frame", id="hidden size"),
        pytest.param(request_frame(layer=1), "layer", id="layer"),
        pytest.param(request_frame(expert=3), "pair_expert", id="expert outside the block"),
        pytest.param(request_frame(expert=2**31 - 1), "pair_expert", id="expert far outside"),
        pytest.param(
            request_frame(pair_weight=np.full(2, np.nan, np.float32)), "pair_weight", id="weight"
        ),
    ],
)
def test_a_bad_frame_is_refused_by_its_field(
    sandbox_server: SandboxProcess, spec: FunctionSpec, content: bytes, field: str
) -> None:
    if field == "payload_bytes":  # the header of another dtype over the same payload
        content = request_frame()[:6] + b"\x02" + request_frame()[7:]
    answer = sandbox_server.http.post(f"/v1/functions/{spec.id}", content=content)
    assert answer.status_code == 400
    assert error_of(answer)["code"] == "bad_frame"
    assert error_of(answer)["field"] == field


@pytest.mark.parametrize("method", ["POST", "DELETE"])
def test_an_unknown_function_is_not_found(sandbox_server: SandboxProcess, method: str) -> None:
    answer = sandbox_server.http.request(method, "/v1/functions/unknown", content=request_frame())
    assert (answer.status_code, error_of(answer)["code"]) == (404, "unknown_function")
    assert error_of(answer)["field"] == "id"


@pytest.mark.parametrize(
    "authorization",
    ["", "Bearer", "Bearer wrong", f"bearer {TOKEN}", TOKEN, f"Bearer {TOKEN} ü"],
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/functions"),
        ("PUT", "/v1/functions/f1"),
        ("DELETE", "/v1/functions/f1"),
        ("POST", "/v1/functions/f1"),
        ("GET", "/v1/anything"),
    ],
)
def test_without_the_token_nothing_of_v1_answers(
    sandbox_server: SandboxProcess, method: str, path: str, authorization: str
) -> None:
    headers = {"authorization": authorization.encode()}
    answer = sandbox_server.http.request(method, path, headers=headers)  # type: ignore[arg-type]
    assert (answer.status_code, error_of(answer)["code"]) == (401, "unauthorized")


def test_a_sandbox_without_a_token_asks_for_none(sandbox: StartSandbox) -> None:
    with sandbox() as open_box:
        assert open_box.http.get("/v1/functions").status_code == 200


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics"])
def test_probes_need_no_token(sandbox_server: SandboxProcess, path: str) -> None:
    answer = httpx.get(f"http://{sandbox_server.address}{path}?verbose=1", trust_env=False)
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("PATCH", "/v1/functions/f1", 405),
        ("GET", "/v1/functions/f1", 405),
        ("POST", "/healthz", 405),
        ("DELETE", "/metrics", 405),
        ("HEAD", "/v1/functions/f1", 405),
        ("HEAD", "/other", 404),
        ("POST", "/v1/functions", 404),
        ("POST", "/v1/functions/", 404),
        ("POST", "/v1/functions/f1/f2", 404),
        ("GET", "/v1/other", 404),
        ("GET", "/", 404),
        ("GET", "//healthz", 404),
    ],
)
def test_other_methods_and_paths_are_refused(
    sandbox_server: SandboxProcess, method: str, path: str, status: int
) -> None:
    answer = sandbox_server.http.request(method, f"http://{sandbox_server.address}{path}")
    assert answer.status_code == status
    if method != "HEAD":
        assert error_of(answer)["field"] == ("method" if status == 405 else "path")


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics"])
def test_probes_answer_head_as_get_without_the_body(
    sandbox_server: SandboxProcess, path: str
) -> None:
    answer = sandbox_server.http.head(path)
    assert (answer.status_code, answer.content) == (200, b"")
    assert int(answer.headers["content-length"]) > 0


def test_metrics_count_frames_and_refusals(fresh: SandboxProcess, store: Store) -> None:
    spec = make_function_spec(store, [0], [0, 1])
    fresh.attach(store, spec)
    for content in (request_frame(n_rows=3), request_frame(n_rows=4), request_frame(expert=5), b""):
        fresh.http.post(f"/v1/functions/{spec.id}", content=content)
    lines = dict(
        line.rsplit(" ", 1)
        for line in fresh.http.get("/metrics").text.splitlines()
        if not line.startswith("#")
    )
    assert lines["faasmoe_expert_frames_total"] == "2.0"
    assert lines["faasmoe_expert_rows_total"] == "7.0"
    assert lines['faasmoe_expert_refused_total{code="bad_frame"}'] == "2.0"
    assert lines["faasmoe_expert_functions"] == "1.0"
    assert (
        float(lines["faasmoe_expert_function_bytes"]) == 2 * store.manifest.layers[0].expert_bytes
    )
    assert lines["faasmoe_expert_attach_seconds_count"] == "1.0"
