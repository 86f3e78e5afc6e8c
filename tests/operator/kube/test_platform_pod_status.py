"""What a pod's status means for its sandbox."""

from typing import Any

import pytest

from faasmoe_operator.kube.platform import (
    is_finished,
    is_terminating,
    pod_address,
    termination_reason,
)


def pod(**status: Any) -> dict[str, Any]:
    return {"metadata": {"name": "p", "uid": "u"}, "status": status}


@pytest.mark.parametrize(
    ("ip", "address"),
    [("10.0.0.7", "10.0.0.7:9090"), ("fd00::7", "[fd00::7]:9090"), ("", ""), (None, "")],
)
def test_a_pod_has_an_address_once_it_has_an_ip(ip: str | None, address: str) -> None:
    assert pod_address(pod(podIP=ip), port=9090) == address


def test_a_created_pod_without_status_has_no_address() -> None:
    created: dict[str, Any] = {"metadata": {"name": "p", "uid": "u"}}
    assert pod_address(created, port=1) == ""
    assert not is_finished(created)
    assert not is_terminating(created)


@pytest.mark.parametrize(
    ("phase", "over"),
    [
        ("Pending", False),
        ("Running", False),
        ("Failed", True),
        ("Succeeded", True),
        ("Unknown", True),
    ],
)
def test_a_pod_is_finished_by_phase(phase: str, over: bool) -> None:
    assert is_finished(pod(phase=phase)) is over


def ended(**terminated: Any) -> dict[str, Any]:
    return {
        "phase": "Failed",
        "containerStatuses": [{"name": "sandbox", "state": {"terminated": terminated}}],
    }


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (
            {"phase": "Failed", "reason": "Evicted", "message": "The node was low on memory."},
            "Evicted: The node was low on memory.",
        ),
        ({"phase": "Failed", "reason": "NodeLost"}, "NodeLost"),
        (ended(exitCode=137, reason="OOMKilled"), "it ended with status 137 (OOMKilled)"),
        (
            ended(exitCode=2, reason="Error", message="loading\nno CUDA device\n"),
            "it ended with status 2: no CUDA device",
        ),
        ({"phase": "Succeeded"}, "its pod is Succeeded"),
        ({"phase": "Unknown"}, "its node is unreachable"),
    ],
)
def test_termination_reason_by_status(status: dict[str, Any], words: str) -> None:
    assert termination_reason(pod(**status)) == words
