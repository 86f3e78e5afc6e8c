"""Attaching, listing, computing and detaching over HTTP, and errors with their fields."""

import json
import shutil
from collections.abc import Iterator, Sequence
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
from faasmoe_expert.functions.native_kernel import describe_kernels
from faasmoe_expert.server.http import FRAME_CONTENT_TYPE


@pytest.fixture
def empty_sandbox(sandbox: StartSandbox) -> Iterator[SandboxProcess]:
    """A sandbox without functions and with a capacity of two, for one test."""
    with sandbox(token=TOKEN, capacity=2, sandbox_id="s7") as empty_sandbox:
        yield empty_sandbox


def attachment(store: Store, spec: FunctionSpec, /, **changes: Any) -> dict[str, Any]:
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


def error_object(response: httpx.Response) -> dict[str, str]:
    error: dict[str, str] = response.json()["error"]
    assert set(error) == {"code", "message", "field"}
    return error


def test_attaches_lists_computes_and_detaches(
    empty_sandbox: SandboxProcess, store: Store, spec: FunctionSpec
) -> None:
    assert empty_sandbox.http.get("/v1/functions").json() == {
        "sandbox": {
            "id": "s7",
            "pid": empty_sandbox.process.pid,
            "capacity": 2,
            "device": "cpu",
            "kernels": describe_kernels(torch.device("cpu")),
            "memory": {"limit_bytes": None, "used_bytes": 0},
        },
        "functions": [],
    }
    first = put_function(empty_sandbox, spec, attachment(store, spec))
    listed = {
        "id": spec.id,
        "layers": [0],
        "experts": [0, 1, 2],
        "model_digest": store.manifest.digest,
        "store": str(store.path),
        "size_bytes": 3 * store.manifest.layers[0].expert_bytes,
        "kernel": describe_kernels(torch.device("cpu")),
        "frames": 0,
    }
    assert (first.status_code, first.json()) == (201, listed)
    assert empty_sandbox.http.get("/v1/functions").json()["functions"] == [listed]
    assert (
        empty_sandbox.http.post(f"/v1/functions/{spec.id}", content=request_frame()).status_code
        == 200
    )
    detached = empty_sandbox.http.delete(f"/v1/functions/{spec.id}")
    assert (detached.status_code, detached.content) == (204, b"")
    assert "content-length" not in detached.headers
    assert empty_sandbox.http.get("/v1/functions").json()["functions"] == []
    maps = Path(f"/proc/{empty_sandbox.process.pid}/maps").read_text()
    assert str(store.path) not in maps


def test_lists_and_detaches_the_functions_of_one_store_alone(
    empty_sandbox: SandboxProcess, store: Store, spec: FunctionSpec, tmp_path: Path
) -> None:
    other, http = tmp_path / "a b", empty_sandbox.http
    shutil.copytree(store.path, other)
    second = FunctionSpec("second", spec.layers, spec.experts)
    for function, path in ((spec, store.path), (second, other)):
        put_function(empty_sandbox, function, attachment(store, function, store=str(path)))

    def listed(**query: str) -> list[str]:
        return [f["id"] for f in http.get("/v1/functions", params=query).json()["functions"]]

    assert listed() == [spec.id, "second"]
    assert listed(store=str(other)) == ["second"]
    assert listed(store="/nowhere") == []
    for _ in range(2):  # idempotent
        http.request("DELETE", "/v1/functions", json={"store": str(store.path)})
    assert listed() == ["second"]
    assert http.post("/v1/functions/second", content=request_frame()).status_code == 200
    answer = http.request("DELETE", "/v1/functions", json={"store": str(other)})
    assert (answer.status_code, answer.json()) == (200, {"detached": ["second"]})
    assert str(other) not in Path(f"/proc/{empty_sandbox.process.pid}/maps").read_text()


@pytest.mark.parametrize(
    ("method", "query", "body", "field"),
    [
        ("GET", "?store=", None, "store"),
        ("GET", "?store=/a&shop=/b", None, "shop"),
        ("DELETE", "", {}, "store"),
        ("DELETE", "", {"store": "/a", "id": "f"}, "id"),
        ("DELETE", "", {"store": "/" + "a" * 5000}, "store"),
    ],
)
def test_names_what_is_wrong_with_a_list_or_a_detachment(
    sandbox_server: SandboxProcess, method: str, query: str, body: Any, field: str
) -> None:
    before = sandbox_server.http.get("/v1/functions").json()
    response = sandbox_server.http.request(method, f"/v1/functions{query}", json=body)
    assert (response.status_code, error_object(response)["field"]) == (422, field)
    assert sandbox_server.http.get("/v1/functions").json() == before


def test_attach_is_idempotent(
    sandbox_server: SandboxProcess, store: Store, spec: FunctionSpec
) -> None:
    before = sandbox_server.http.get("/v1/functions").json()
    response = put_function(sandbox_server, spec, attachment(store, spec))
    assert (response.status_code, response.json()) == (200, before["functions"][0])
    assert sandbox_server.http.get("/v1/functions").json() == before


@pytest.mark.parametrize(
    "change", [{"experts": [0, 1]}, {"layers": [0, 1]}, {"model_digest": "sha256:other"}]
)
def test_rejects_an_attached_id_with_other_content(
    sandbox_server: SandboxProcess, store: Store, spec: FunctionSpec, change: dict[str, Any]
) -> None:
    response = put_function(sandbox_server, spec, attachment(store, spec, **change))
    assert (response.status_code, error_object(response)["field"]) == (409, "id")
    assert error_object(response)["code"] == "attach_refused"


def test_full_sandbox_rejects_attachments_until_a_detach(
    empty_sandbox: SandboxProcess, store: Store
) -> None:
    one, two, three = (make_function_spec(store, [layer], [0]) for layer in range(3))
    empty_sandbox.attach(store, one)
    empty_sandbox.attach(store, two)
    refused = put_function(empty_sandbox, three, attachment(store, three))
    assert (refused.status_code, error_object(refused)["field"]) == (409, "capacity")
    assert put_function(empty_sandbox, two, attachment(store, two)).status_code == 200
    empty_sandbox.http.delete(f"/v1/functions/{one.id}")
    assert put_function(empty_sandbox, three, attachment(store, three)).status_code == 201


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("mode", OutputMode)
def test_response_contains_the_experts_outputs(
    empty_sandbox: SandboxProcess, prepared_store: PreparedStore, family: str, mode: OutputMode
) -> None:
    store = prepared_store(family)
    spec = make_function_spec(store, [1], [2, 5])
    empty_sandbox.attach(store, spec)
    hidden = torch.ones(2, 32)  # [T, H]
    pairs = np.array([0, 0, 1], dtype=np.int32), np.array([5, 2, 5], dtype=np.int32)
    weights = np.array([0.5, 2.0, 1.0], dtype=np.float32)
    frame = request_frame(
        layer=1, mode=mode, pair_row=pairs[0], pair_expert=pairs[1], pair_weight=weights
    )
    response = empty_sandbox.http.post(f"/v1/functions/{spec.id}", content=frame)
    assert response.headers["content-type"] == FRAME_CONTENT_TYPE
    outputs = decode_response(response.content, decode_request(frame).header)
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
def test_rejects_invalid_attachments_by_field(
    sandbox_server: SandboxProcess, store: Store, change: dict[str, Any], field: str
) -> None:
    spec = make_function_spec(store, [1], [0])
    response = sandbox_server.http.put(
        f"/v1/functions/{spec.id}", content=json.dumps(attachment(store, spec, **change))
    )
    assert response.status_code == 422
    assert error_object(response)["field"] == field
    assert error_object(response)["message"].startswith(f"{field}: ")
    assert len(response.content) < 9 << 10  # contains the path twice, everything else truncated
    assert len(sandbox_server.http.get("/v1/functions").json()["functions"]) == 1


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, '{"store": ""}'.encode("utf-16")],
)
def test_rejects_attachments_that_are_not_json_objects(
    sandbox_server: SandboxProcess, text: bytes
) -> None:
    response = sandbox_server.http.put("/v1/functions/f1", content=text)
    assert (response.status_code, error_object(response)["field"]) == (422, "body")


def attachments(store: Store, specs: Sequence[FunctionSpec], /, **changes: Any) -> dict[str, Any]:
    value = {
        "store": str(store.path),
        "model_digest": store.manifest.digest,
        "functions": [spec.to_json() for spec in specs],
        **changes,
    }
    return {name: v for name, v in value.items() if v is not ...}


def test_attaches_several_functions_with_one_call(
    empty_sandbox: SandboxProcess, store: Store
) -> None:
    specs = [make_function_spec(store, [1], [expert]) for expert in range(2)]
    for _ in range(2):  # idempotent
        response = empty_sandbox.http.put("/v1/functions", json=attachments(store, specs))
        listed = empty_sandbox.http.get("/v1/functions").json()["functions"]
        assert (response.status_code, response.json()) == (200, {"functions": listed})
    assert [function["id"] for function in listed] == [spec.id for spec in specs]
    for expert, spec in enumerate(specs):
        frame = request_frame(layer=1, expert=expert)
        answer = empty_sandbox.http.post(f"/v1/functions/{spec.id}", content=frame)
        assert answer.status_code == 200


def test_a_refused_function_keeps_none_of_the_others_from_being_attached(
    empty_sandbox: SandboxProcess, store: Store
) -> None:
    bad = make_function_spec(store, [9], [0])
    good = [make_function_spec(store, [1], [expert]) for expert in range(3)]
    specs = (good[0], bad, good[1], good[2])
    response = empty_sandbox.http.put("/v1/functions", json=attachments(store, specs))
    results = response.json()["functions"]
    assert response.status_code == 200
    assert [result["id"] for result in results] == [spec.id for spec in specs]
    errors = [result.get("error", {}) for result in results]
    assert [(e.get("code"), e.get("field")) for e in errors] == [
        (None, None),
        ("bad_attachment", "layers"),
        (None, None),
        ("attach_refused", "capacity"),
    ]
    listed = empty_sandbox.http.get("/v1/functions").json()["functions"]
    assert [function["id"] for function in listed] == [good[0].id, good[1].id]
    metrics = empty_sandbox.http.get("/metrics").text
    assert 'faasmoe_expert_refused_total{code="attach_refused"} 1.0' in metrics


@pytest.mark.parametrize(
    ("change", "field"),
    [
        pytest.param({"store": ...}, "store", id="store missing"),
        pytest.param({"model_digest": 7}, "model_digest", id="digest of another type"),
        pytest.param({"functions": ...}, "functions", id="functions missing"),
        pytest.param({"functions": []}, "functions", id="no functions"),
        pytest.param({"functions": {"id": "f"}}, "functions", id="functions no list"),
        pytest.param({"functions": ["f"]}, "functions", id="function no object"),
        pytest.param({"functions": [{}] * 257}, "functions", id="too many functions"),
        pytest.param({"functions": [{"id": "f", "layers": [0]}]}, "experts", id="no experts"),
        pytest.param(
            {"functions": [{"id": "a-b", "layers": [0], "experts": [0]}]}, "id", id="invalid id"
        ),
        pytest.param(
            {"functions": [{"id": "f", "layers": [0], "experts": [0], "store": "/x"}]},
            "store",
            id="a store for one function",
        ),
        pytest.param({"layers": [0]}, "layers", id="unknown field"),
    ],
)
def test_rejects_invalid_attachments_of_several_functions_by_field(
    sandbox_server: SandboxProcess, store: Store, change: dict[str, Any], field: str
) -> None:
    good = make_function_spec(store, [1], [0])
    body = attachments(store, [good], **change)
    if isinstance(change.get("functions"), list) and 0 < len(change["functions"]) < 200:
        body["functions"] = [good.to_json(), *change["functions"]]
    response = sandbox_server.http.put("/v1/functions", json=body)
    assert (response.status_code, error_object(response)["field"]) == (422, field)
    assert error_object(response)["message"].startswith(f"{field}: ")
    assert len(sandbox_server.http.get("/v1/functions").json()["functions"]) == 1  # as before


@pytest.mark.parametrize("function_id", ["a-b", "a" * 65, "a%2Fb", "%00", "\N{SUPERSCRIPT TWO}"])
def test_rejects_invalid_ids(
    sandbox_server: SandboxProcess, store: Store, spec: FunctionSpec, function_id: str
) -> None:
    response = sandbox_server.http.put(f"/v1/functions/{function_id}", json=attachment(store, spec))
    assert (response.status_code, error_object(response)["field"]) == (422, "id")


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
def test_rejects_a_damaged_store_by_file(
    sandbox_server: SandboxProcess, store: Store, tmp_path: Path, damage: Any
) -> None:
    copy = Store.open(shutil.copytree(store.path, tmp_path / "store"))
    manifest = json.loads((copy.path / "manifest.json").read_text())
    manifest["files"]["model/extra"] = {"size_bytes": 0, "sha256": "0" * 64}
    digest = _write_manifest(copy.path, manifest)
    damage(copy.path / "experts" / "00000.safetensors")
    spec = make_function_spec(store, [0], [3])
    response = put_function(sandbox_server, spec, attachment(copy, spec, model_digest=digest))
    assert (response.status_code, error_object(response)["field"]) == (422, "store")
    assert "00000.safetensors" in error_object(response)["message"]


def test_rejects_a_file_truncated_while_the_store_is_open(
    empty_sandbox: SandboxProcess, store: Store, tmp_path: Path
) -> None:
    copy = Store.open(shutil.copytree(store.path, tmp_path / "store"))
    empty_sandbox.attach(copy, make_function_spec(copy, [0], [0]))
    damage_truncated(copy.path / "experts" / "00001.safetensors")
    for layers in ([1], [0, 1]):
        spec = make_function_spec(copy, layers, [1])
        response = put_function(empty_sandbox, spec, attachment(copy, spec))
        assert (response.status_code, error_object(response)["field"]) == (422, "store")
        assert "00001.safetensors: size: got" in error_object(response)["message"]
    assert len(empty_sandbox.http.get("/v1/functions").json()["functions"]) == 1


def test_reopens_a_store_after_its_last_function_is_detached(
    empty_sandbox: SandboxProcess, store: Store, tmp_path: Path
) -> None:
    copy = Store.open(shutil.copytree(store.path, tmp_path / "store"))
    spec = make_function_spec(copy, [1], [3])
    empty_sandbox.attach(store, make_function_spec(store, [0], [0]))  # same digest, other path
    empty_sandbox.attach(copy, spec)
    (copy.path / "manifest.json").unlink()
    empty_sandbox.http.delete(f"/v1/functions/{spec.id}")
    response = put_function(empty_sandbox, spec, attachment(copy, spec))
    assert (response.status_code, error_object(response)["field"]) == (422, "store")
    assert "manifest.json: not found" in error_object(response)["message"]


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> str:
    """Write a manifest with a new digest, so that the sandbox has not opened the store yet."""
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
def test_rejects_invalid_frames_by_field(
    sandbox_server: SandboxProcess, spec: FunctionSpec, content: bytes, field: str
) -> None:
    if field == "payload_bytes":  # header with another dtype, same payload
        content = request_frame()[:6] + b"\x02" + request_frame()[7:]
    response = sandbox_server.http.post(f"/v1/functions/{spec.id}", content=content)
    assert response.status_code == 400
    assert error_object(response)["code"] == "bad_frame"
    assert error_object(response)["field"] == field


@pytest.mark.parametrize("method", ["POST", "DELETE"])
def test_unknown_function_returns_404(sandbox_server: SandboxProcess, method: str) -> None:
    response = sandbox_server.http.request(method, "/v1/functions/unknown", content=request_frame())
    assert (response.status_code, error_object(response)["code"]) == (404, "unknown_function")
    assert error_object(response)["field"] == "id"


@pytest.mark.parametrize(
    "authorization",
    ["", "Bearer", "Bearer wrong", f"bearer {TOKEN}", TOKEN, f"Bearer {TOKEN} ü"],
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/functions"),
        ("PUT", "/v1/functions/f1"),
        ("PUT", "/v1/functions"),
        ("DELETE", "/v1/functions/f1"),
        ("POST", "/v1/functions/f1"),
        ("GET", "/v1/anything"),
    ],
)
def test_v1_requires_the_token(
    sandbox_server: SandboxProcess, method: str, path: str, authorization: str
) -> None:
    headers = {"authorization": authorization.encode()}
    response = sandbox_server.http.request(method, path, headers=headers)  # type: ignore[arg-type]
    assert (response.status_code, error_object(response)["code"]) == (401, "unauthorized")


def test_requires_no_token_if_none_is_configured(sandbox: StartSandbox) -> None:
    with sandbox() as open_sandbox:
        assert open_sandbox.http.get("/v1/functions").status_code == 200


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics"])
def test_probes_need_no_token(sandbox_server: SandboxProcess, path: str) -> None:
    response = httpx.get(
        f"http://{sandbox_server.address}{path}?verbose=1", trust_env=False, timeout=60
    )
    assert response.status_code == 200


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
def test_rejects_other_methods_and_paths(
    sandbox_server: SandboxProcess, method: str, path: str, status: int
) -> None:
    response = sandbox_server.http.request(method, f"http://{sandbox_server.address}{path}")
    assert response.status_code == status
    if method != "HEAD":
        assert error_object(response)["field"] == ("method" if status == 405 else "path")


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics"])
def test_probes_support_head(sandbox_server: SandboxProcess, path: str) -> None:
    response = sandbox_server.http.head(path)
    assert (response.status_code, response.content) == (200, b"")
    assert int(response.headers["content-length"]) > 0


def test_metrics_count_frames_and_rejections(empty_sandbox: SandboxProcess, store: Store) -> None:
    spec = make_function_spec(store, [0], [0, 1])
    empty_sandbox.attach(store, spec)
    for content in (request_frame(n_rows=3), request_frame(n_rows=4), request_frame(expert=5), b""):
        empty_sandbox.http.post(f"/v1/functions/{spec.id}", content=content)
    lines = dict(
        line.rsplit(" ", 1)
        for line in empty_sandbox.http.get("/metrics").text.splitlines()
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
