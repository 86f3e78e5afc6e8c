"""REST client of the API server that KUBECONFIG names, for tests."""

from __future__ import annotations

import base64
import os
import ssl
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
import yaml

Object = dict[str, Any]
T = TypeVar("T")

FIELD_MANAGER = "faasmoe-tests"
TIMEOUT_S = 30.0
POLL_S = 0.1

PATHS: Mapping[str, str] = {
    "clusterroles": "apis/rbac.authorization.k8s.io/v1",
    "clusterrolebindings": "apis/rbac.authorization.k8s.io/v1",
    "roles": "apis/rbac.authorization.k8s.io/v1",
    "rolebindings": "apis/rbac.authorization.k8s.io/v1",
    "customresourcedefinitions": "apis/apiextensions.k8s.io/v1",
    "deployments": "apis/apps/v1",
    "replicasets": "apis/apps/v1",
    "jobs": "apis/batch/v1",
    "leases": "apis/coordination.k8s.io/v1",
    "networkpolicies": "apis/networking.k8s.io/v1",
    "ingresses": "apis/networking.k8s.io/v1",
    "poddisruptionbudgets": "apis/policy/v1",
    "storageclasses": "apis/storage.k8s.io/v1",
    "servicemonitors": "apis/monitoring.coreos.com/v1",
    "flowschemas": "apis/flowcontrol.apiserver.k8s.io/v1",
    "validatingadmissionpolicies": "apis/admissionregistration.k8s.io/v1",
    "validatingadmissionpolicybindings": "apis/admissionregistration.k8s.io/v1",
    "moemodels": "apis/faasmoe.dev/v1alpha1",
    "tenants": "apis/faasmoe.dev/v1alpha1",
}
CLUSTER_SCOPED = (
    "namespaces",
    "nodes",
    "customresourcedefinitions",
    "clusterroles",
    "clusterrolebindings",
    "flowschemas",
    "persistentvolumes",
    "storageclasses",
    "validatingadmissionpolicies",
    "validatingadmissionpolicybindings",
)


@dataclass(frozen=True, slots=True)
class Credentials:
    """Server and credentials of a kubeconfig's current context."""

    server: str
    verify: ssl.SSLContext
    headers: Mapping[str, str] = field(repr=False)
    ca: bytes = field(repr=False)

    @classmethod
    def from_kubeconfig(cls, path: Path) -> Credentials:
        """Read the current context's server and user."""
        config = yaml.safe_load(path.read_text())
        context = _entry(config["contexts"], config["current-context"])["context"]
        cluster = _entry(config["clusters"], context["cluster"])["cluster"]
        user = _entry(config["users"], context["user"])["user"]
        ca = _inline_or_file(cluster, "certificate-authority")
        verify = ssl.create_default_context(cadata=ca.decode())
        if "client-certificate-data" in user or "client-certificate" in user:
            with tempfile.TemporaryDirectory() as folder:
                certificate, key = Path(folder, "certificate"), Path(folder, "key")
                certificate.write_bytes(_inline_or_file(user, "client-certificate"))
                key.write_bytes(_inline_or_file(user, "client-key"))
                verify.load_cert_chain(certificate, key)
        token = user.get("token")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return cls(cluster["server"], verify, headers, ca)

    def with_token(self, token: str) -> Credentials:
        """Return credentials with a bearer token."""
        verify = ssl.create_default_context(cadata=self.ca.decode())
        return Credentials(self.server, verify, {"Authorization": f"Bearer {token}"}, self.ca)

    def kubeconfig_for(self, token: str, *, namespace: str) -> str:
        """Return a kubeconfig for the same server with a bearer token."""
        ca = base64.b64encode(self.ca).decode()
        cluster = {"server": self.server, "certificate-authority-data": ca}
        return yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "tests",
                "clusters": [{"name": "tests", "cluster": cluster}],
                "users": [{"name": "tests", "user": {"token": token}}],
                "contexts": [
                    {
                        "name": "tests",
                        "context": {"cluster": "tests", "user": "tests", "namespace": namespace},
                    }
                ],
            }
        )


def _entry(entries: list[Object], name: str) -> Object:
    return next(entry for entry in entries if entry["name"] == name)


def _inline_or_file(section: Object, name: str) -> bytes:
    if f"{name}-data" in section:
        return base64.b64decode(section[f"{name}-data"])
    return Path(section[name]).read_bytes()


class ApiRequestError(AssertionError):
    """The API server rejected a request.

    Attributes:
        status: HTTP status.
        reason: the API's reason, such as Invalid or AlreadyExists.
    """

    def __init__(self, request: str, status: int, answer: Object) -> None:
        self.status, self.reason = status, str(answer.get("reason", ""))
        super().__init__(f"{request}: {status} {answer.get('message', answer)}")


class ApiServer:
    """Synchronous client. Kinds are given as plurals: `api.get("pods", "llm", "name")`."""

    def __init__(self, credentials: Credentials) -> None:
        self.credentials = credentials
        self._http = httpx.Client(
            base_url=credentials.server,
            verify=credentials.verify,
            headers=dict(credentials.headers),
            timeout=TIMEOUT_S,
            trust_env=False,
        )

    @classmethod
    def from_environment(cls) -> ApiServer:
        """Return the API server that KUBECONFIG names."""
        return cls(Credentials.from_kubeconfig(Path(os.environ["KUBECONFIG"])))

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def version(self) -> str:
        """Return the server's version."""
        return str(self._call("GET", "/version")["gitVersion"])

    def core_resources(self) -> set[str]:
        """Return the names of the resources and subresources of the core group."""
        return {str(resource["name"]) for resource in self._call("GET", "/api/v1")["resources"]}

    def find(self, plural: str, namespace: str, name: str) -> Object | None:
        """Return an object; None if it does not exist."""
        try:
            return self.get(plural, namespace, name)
        except ApiRequestError as error:
            if error.status == 404:
                return None
            raise

    def get(self, plural: str, namespace: str, name: str) -> Object:
        """Return an object; raises ApiRequestError."""
        return self._call("GET", _path(plural, namespace, name))

    def list(
        self, plural: str, namespace: str = "", *, labels: str = "", fields: str = ""
    ) -> list[Object]:
        """Return the objects of a namespace, or of all namespaces."""
        params = {"labelSelector": labels, "fieldSelector": fields}
        answer = self._call("GET", _path(plural, namespace), params=params)
        items: list[Object] = answer["items"]
        return items

    def create(self, plural: str, obj: Object) -> Object:
        """Create an object; raises ApiRequestError."""
        return self._call("POST", _path(plural, _namespace(obj)), json=obj)

    def apply(self, plural: str, obj: Object, *, dry_run: bool = False) -> Object:
        """Apply an object (server-side apply); raises ApiRequestError."""
        params = {"fieldManager": FIELD_MANAGER, "force": "true"}
        if dry_run:
            params["dryRun"] = "All"
        path = _path(plural, _namespace(obj), obj["metadata"]["name"])
        return self._patch(path, obj, kind="apply-patch+yaml", params=params)

    def patch(
        self, plural: str, namespace: str, name: str, change: Object, *, subresource: str = ""
    ) -> Object:
        """Merge-patch an object or its subresource; raises ApiRequestError."""
        path = _path(plural, namespace, name) + (f"/{subresource}" if subresource else "")
        return self._patch(path, change, kind="merge-patch+json", params={})

    def delete(self, plural: str, namespace: str, name: str, **options: Any) -> None:
        """Start to delete an object; no error if it does not exist."""
        try:
            self._call("DELETE", _path(plural, namespace, name), json=options or None)
        except ApiRequestError as error:
            if error.status != 404:
                raise

    def create_token(self, namespace: str, service_account: str) -> str:
        """Return a token of a ServiceAccount, valid for one hour."""
        path = f"{_path('serviceaccounts', namespace, service_account)}/token"
        body = {"spec": {"expirationSeconds": 3600}}
        return str(self._call("POST", path, json=body)["status"]["token"])

    def _patch(self, path: str, body: Object, *, kind: str, params: Mapping[str, str]) -> Object:
        headers = {"Content-Type": f"application/{kind}"}
        return self._call("PATCH", path, json=body, params=params, headers=headers)

    def _call(self, method: str, path: str, **options: Any) -> Object:
        response = self._http.request(method, path, **options)
        answer: Object = response.json()
        if not response.is_success:
            raise ApiRequestError(f"{method} {path}", response.status_code, answer)
        return answer


def _path(plural: str, namespace: str, name: str = "") -> str:
    parts = [PATHS.get(plural, "api/v1")]
    if namespace and plural not in CLUSTER_SCOPED:
        parts += ["namespaces", namespace]
    return "/" + "/".join([*parts, plural, *([name] if name else [])])


def _namespace(obj: Object) -> str:
    return str(obj["metadata"].get("namespace", ""))


def eventually(
    read: Callable[[], T], accept: Callable[[T], object], *, timeout_s: float = 180.0
) -> T:
    """Poll until a value is accepted and return it; fails with the last value at the deadline."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        value = read()
        if accept(value):
            return value
        if time.monotonic() > deadline_s:
            raise AssertionError(f"not within {timeout_s:g} s; the last was {value!r}")
        time.sleep(POLL_S)  # polling, with a deadline
