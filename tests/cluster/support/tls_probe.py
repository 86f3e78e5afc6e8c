"""The servers of a release with TLS, and what they answer to whom."""

from __future__ import annotations

import base64
import hashlib
import json
import ssl
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from apiserver import ApiServer, Object
from moemodels import router_pods, sandbox_pods
from pod_runner import PodRunner
from release import Release

PROGRAM = Path(__file__).parents[1] / "real_node" / "tls_in_pod.py"
ROUTER_PORT, SANDBOX_PORT, STORE_SERVER_PORT = 8000, 9090, 9092
OPERATOR_PORT, GATEWAY_LINK_PORT = 8090, 8092
OPERATOR_LABELS = "app.kubernetes.io/name=faasmoe-operator"
STORE_SERVER_LABELS = "app.kubernetes.io/component=store-server"


@dataclass(frozen=True, slots=True)
class Question:
    """What a server is asked, and how.

    Attributes:
        address: HOST:PORT.
        head: head of an HTTP request.
        folder: mounted folder with the certificate to show; empty for none.
        is_plain: whether it is asked without TLS.
    """

    address: str
    head: str
    folder: str = ""
    is_plain: bool = False


@dataclass(frozen=True, slots=True)
class Servers:
    """Addresses of one model's servers, as HOST:PORT."""

    router: str
    sandbox: str
    operator: str
    gateway_link: str

    @classmethod
    def of(cls, api: ApiServer, release: Release, namespace: str, model: str) -> Servers:
        """Return the servers of a model that is active."""
        (operator,) = release.operators()
        host = operator["status"]["podIP"]
        return cls(
            router=_address(router_pods(api, namespace, model)[0], ROUTER_PORT),
            sandbox=_address(sandbox_pods(api, namespace, model)[0], SANDBOX_PORT),
            operator=f"{host}:{OPERATOR_PORT}",
            gateway_link=f"{host}:{GATEWAY_LINK_PORT}",
        )

    @property
    def all(self) -> tuple[str, ...]:
        """All of them."""
        return (self.router, self.sandbox, self.operator, self.gateway_link)


def store_server(api: ApiServer, namespace: str) -> str:
    """Return the address of the namespace's store server."""
    return _address(api.list("pods", namespace, labels=STORE_SERVER_LABELS)[0], STORE_SERVER_PORT)


def request_head(method: str, path: str, **headers: str) -> str:
    """Return the head of an HTTP request without a body; `_` in names of headers stands for `-`."""
    lines = [f"{method} {path} HTTP/1.1", "host: a", "content-length: 0", "connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""])


def ask(
    programs: PodRunner, questions: Sequence[Question], *, certificates: dict[str, str]
) -> list[str]:
    """Return the first line of each answer, without the reason; `closed` where there is none.

    Args:
        programs: runs the program that asks.
        questions: what is asked.
        certificates: Secrets of the namespace, by the folder where they are mounted.
    """
    volumes: dict[str, Object] = {
        folder: {"secret": {"secretName": name, "defaultMode": 0o444}}
        for folder, name in certificates.items()
    }
    arguments = json.dumps([asdict(question) for question in questions])
    message = programs.run("ask", PROGRAM, arguments, volumes=volumes)
    return [" ".join(line.split()[1:2]) or line for line in json.loads(message)]


def wait_for_certificate(programs: PodRunner, addresses: Sequence[str], certificate: bytes) -> None:
    """Wait until all servers show a certificate, in PEM."""
    der = ssl.PEM_cert_to_DER_cert(certificate.decode())
    questions = [asdict(Question(address, request_head("GET", "/"))) for address in addresses]
    fingerprint = hashlib.sha256(der).hexdigest()
    programs.run("wait", PROGRAM, json.dumps(questions), fingerprint)


def tls_secret(name: str, namespace: str, files: dict[str, bytes]) -> Object:
    """Return a Secret of a certificate."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "namespace": namespace},
        "type": "kubernetes.io/tls",
        "data": {name: base64.b64encode(content).decode() for name, content in files.items()},
    }


def _address(pod: Object, port: int) -> str:
    return f"{pod['status']['podIP']}:{port}"
