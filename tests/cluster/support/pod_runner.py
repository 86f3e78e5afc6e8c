"""Runs programs in pods, since pod and Service addresses are reachable only from within."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from apiserver import ApiServer, Object, eventually
from real_nodes import HOSTNAME_LABEL

USER = 65532
ROOT = 0
TIMEOUT_S = 300.0
"""Includes the time for which the program itself waits."""


@dataclass(frozen=True, slots=True)
class PodRunner:
    """Runs Python programs in pods of one namespace; each writes a termination message.

    Attributes:
        api: administrator client.
        namespace: namespace of the pods.
        node: host name of the node.
        image: an image with Python.
    """

    api: ApiServer
    namespace: str
    node: str
    image: str

    def run(
        self,
        name: str,
        program: Path,
        *arguments: str,
        user: int = USER,
        volumes: Mapping[str, Object] | None = None,
    ) -> str:
        """Run a program and return its termination message; fails the test if the program fails."""
        self.start(name, program, *arguments, user=user, volumes=volumes)
        message = self.wait_for_termination_message(name)
        self.api.delete("pods", self.namespace, name)
        return message

    def start(
        self,
        name: str,
        program: Path,
        *arguments: str,
        user: int = USER,
        volumes: Mapping[str, Object] | None = None,
    ) -> None:
        """Start a program.

        Args:
            name: name of its pod.
            program: file with its source.
            arguments: its command line arguments.
            user: user id; all but ROOT comply with the restricted Pod Security Standard.
            volumes: volume sources by mount path.
        """
        container = {
            "name": "program",
            "image": self.image,
            "imagePullPolicy": "IfNotPresent",
            "command": ["python", "-c", program.read_text(), *arguments],
            "resources": {"requests": {"cpu": "10m", "memory": "32Mi"}},
            "securityContext": _container_security(user),
            "terminationMessagePolicy": "FallbackToLogsOnError",
            "volumeMounts": [
                {"name": f"volume-{number}", "mountPath": path}
                for number, path in enumerate(volumes or {})
            ],
        }
        spec = {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "nodeSelector": {HOSTNAME_LABEL: self.node},
            "securityContext": {"runAsUser": user, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [container],
            "volumes": [
                {"name": f"volume-{number}", **source}
                for number, source in enumerate((volumes or {}).values())
            ],
        }
        meta = {"name": name, "namespace": self.namespace}
        self.api.create("pods", {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec})

    def wait_for_termination_message(self, name: str) -> str:
        """Wait for a program and return its termination message; fails if the program fails."""
        status = eventually(
            lambda: self.api.get("pods", self.namespace, name)["status"],
            lambda status: status.get("phase") in ("Succeeded", "Failed"),
            timeout_s=TIMEOUT_S,
        )
        (container,) = status["containerStatuses"]
        message = str(container["state"]["terminated"].get("message", ""))
        assert status["phase"] == "Succeeded", f"pod {name} failed: {message}"
        return message


def _container_security(user: int) -> Object:
    if user == ROOT:
        return {}
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
    }
