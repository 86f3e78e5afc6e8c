"""Programs that run in pods: what pods and Services answer is to be had only from within."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from apiserver import ApiServer, Object, eventually
from real_nodes import HOSTNAME_LABEL

USER = 65532
ROOT = 0
TIMEOUT_S = 300.0
"""Much of it is for what the program waits for."""


@dataclass(frozen=True, slots=True)
class PodRunner:
    """Runs Python programs in pods of one namespace; each ends with a word in its termination log.

    Attributes:
        api: as an administrator.
        namespace: where.
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
        """Run a program to its end; return its last words, which fail the test if it failed."""
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
            name: of its pod.
            program: its text.
            arguments: of its command line.
            user: whose rights it has; all but ROOT keep to the restricted Pod Security Standard.
            volumes: sources of volumes by the path at which it has them.
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
        """Wait for a program's end and return its last words, which fail the test if it failed."""
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
