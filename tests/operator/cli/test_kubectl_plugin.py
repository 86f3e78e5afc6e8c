"""`kubectl faasmoe` reads a cluster by kubectl and says what `kubectl get` does not."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from faasmoe_contracts.usage import USAGE_FIELDS, UsageRecord
from faasmoe_operator.cli.kubectl_plugin import (
    main,
    port_scheme,
    render_explanation,
    render_top,
    render_usage,
)
from faasmoe_operator.control.usage_ledger import UsageLedger, encode_ledger
from faasmoe_operator.errors import CommandError

CONDITIONS = [
    {"type": "Ready", "status": "False", "reason": "Unschedulable", "message": "FunctionsReady"},
    {"type": "StoreReady", "status": "True", "reason": "Prepared", "message": "done"},
    {"type": "FunctionsReady", "status": "False", "reason": "Unschedulable", "message": "no node"},
]
MODEL: dict[str, Any] = {
    "metadata": {"name": "qwen"},
    "spec": {},
    "status": {
        "conditions": CONDITIONS,
        "router": {"replicas": 2, "readyReplicas": 1},
        "functions": {"total": 8, "active": 3, "replicas": 4},
        "sandboxes": {"total": 5, "ready": 4, "generic": 1},
        "model": {"sizeBytes": 1 << 30},
    },
}


def make_pod(name: str, component: str, *, is_ready: bool = True, **spec: Any) -> dict[str, Any]:
    ready = {"type": "Ready", "status": "True" if is_ready else "False"}
    labels = {"app.kubernetes.io/component": component, "faasmoe.dev/function": f"f-{name}"}
    resources = {"requests": {"memory": "1Gi"}}
    return {
        "metadata": {"name": name, "labels": labels},
        "spec": {"containers": [{"resources": resources}], **spec},
        "status": {"phase": "Running" if is_ready else "Pending", "conditions": [ready]},
    }


PODS = [
    make_pod("router-a", "router", nodeName="n1"),
    make_pod("sandbox-a", "sandbox", nodeName="n1"),
    make_pod("sandbox-b", "sandbox", is_ready=False),
]
EVENTS = [
    {"type": "Warning", "reason": "FailedScheduling", "message": "0 of 3 nodes"},
    {"type": "Normal", "reason": "Pulled", "message": "image"},
]


def test_explains_what_does_not_hold() -> None:
    text = render_explanation(MODEL, PODS, EVENTS)
    assert text.startswith("qwen: Ready is False (Unschedulable)")
    assert "FunctionsReady: Unschedulable: no node" in text
    assert "StoreReady" not in text
    assert "sandbox-b" in text
    assert "sandbox-a" not in text
    assert "FailedScheduling: 0 of 3 nodes" in text
    assert "Pulled" not in text


def test_a_model_that_no_operator_has_seen_is_told() -> None:
    assert "no operator has seen it" in render_explanation({"metadata": {"name": "x"}}, [], [])


def test_top_shows_counts_and_sandboxes() -> None:
    text = render_top(MODEL, PODS)
    assert "routers: 1 of 2 ready; functions: 3 of 8 active, 4 replicas; store: 1.00 GiB" in text
    rows = [line.split() for line in text.splitlines() if line.startswith("sandbox-")]
    assert rows == [
        ["sandbox-a", "f-sandbox-a", "yes", "n1", "1Gi"],
        ["sandbox-b", "f-sandbox-b", "no", "-", "1Gi"],
    ]


def test_usage_is_a_row_for_each_tenant() -> None:
    record = UsageRecord(*range(len(USAGE_FIELDS)))
    ledger = UsageLedger(0.0, usage_by_tenant={"acme": record})
    header, row = render_usage(encode_ledger(ledger, max_chars=10_000)).splitlines()
    assert header.split() == ["TENANT", *(field.upper() for field in USAGE_FIELDS)]
    assert row.split() == ["acme", *(f"{number:g}" for number in range(len(USAGE_FIELDS)))]
    with pytest.raises(CommandError, match="invalid ledger"):
        render_usage("{}")


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kubectl that answers from files named after the kind, and records its arguments."""
    program = tmp_path / "kubectl"
    program.write_text(
        f'#!/bin/sh\necho "$@" >>{tmp_path}/calls\n'
        'while [ "$1" != get ]; do shift; done\n'
        f'cat {tmp_path}/$2.json 2>/dev/null || {{ echo "no $2 found" >&2; exit 1; }}\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for kind, value in (
        ("moemodel", MODEL),
        ("pods", {"items": PODS}),
        ("events", {"items": [{**EVENTS[0], "involvedObject": {"name": "sandbox-b"}}]}),
    ):
        (tmp_path / f"{kind}.json").write_text(json.dumps(value))
    return tmp_path


def test_runs_kubectl_with_the_users_options(
    kubectl: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", "qwen", "-n", "llm", "--context", "prod"]) == 0
    assert "FailedScheduling" in capsys.readouterr().out
    calls = (kubectl / "calls").read_text().splitlines()
    assert all(call.startswith("--namespace=llm --context=prod get ") for call in calls)
    assert "--selector faasmoe.dev/model=qwen" in "\n".join(calls)


def test_errors_of_kubectl_are_told(kubectl: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["usage", "qwen"]) == 1
    assert "kubectl get configmap: no configmap found" in capsys.readouterr().err


def test_a_forwarded_port_speaks_what_its_service_says() -> None:
    ports: list[dict[str, Any]] = [{"port": 80, "appProtocol": "https"}, {"port": 8001}]
    assert port_scheme({"spec": {"ports": ports}}, 80) == "https"
    assert port_scheme({"spec": {"ports": ports}}, 8001) == "http"
