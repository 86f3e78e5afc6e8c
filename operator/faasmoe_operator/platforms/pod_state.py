"""What a sandbox's pod is like, as far as the control core is concerned. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Pod = Mapping[str, Any]

_OVER = ("Failed", "Succeeded", "Unknown")


def name_of(pod: Pod) -> str:
    """Return a pod's name."""
    return str(pod["metadata"]["name"])


def uid_of(pod: Pod) -> str:
    """Return a pod's uid."""
    return str(pod["metadata"]["uid"])


def is_going(pod: Pod) -> bool:
    """Return whether a pod is being deleted."""
    return "deletionTimestamp" in pod["metadata"]


def is_over(pod: Pod) -> bool:
    """Return whether a pod will never serve again."""
    return _status(pod).get("phase") in _OVER


def address_of(pod: Pod, *, port: int) -> str:
    """Return `host:port` of a pod; empty until it has an address."""
    host = _status(pod).get("podIP") or ""
    if not host:
        return ""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def end_of(pod: Pod) -> str:
    """Return in words why a pod is over."""
    status = _status(pod)
    if status.get("phase") == "Unknown":
        return "its node does not answer any more"
    if said := status.get("message") or status.get("reason"):
        reason = status.get("reason") or ""
        return said if said.startswith(reason) else f"{reason}: {said}"
    ends = [
        container["state"]["terminated"]
        for container in status.get("containerStatuses", ())
        if (container.get("state") or {}).get("terminated")
    ]
    return _ended(ends[0]) if ends else f"its pod is {status.get('phase', 'gone')}"


def _ended(terminated: Mapping[str, Any]) -> str:
    reason, code = terminated.get("reason") or "", terminated.get("exitCode")
    lines = str(terminated.get("message") or "").strip().splitlines()
    how = f"it ended with status {code}" + (f" ({reason})" if reason not in ("", "Error") else "")
    return f"{how}: {lines[-1][:300]}" if lines else how


def _status(pod: Pod) -> Mapping[str, Any]:
    status: Mapping[str, Any] = pod.get("status") or {}
    return status
