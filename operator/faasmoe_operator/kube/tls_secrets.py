"""Keeps certificates current: the operator's own, those of gateways, and those of models' pods.

They follow from the root key (`certificates.py`), so this only writes them: into a folder of the
operator, and as Secrets of type `kubernetes.io/tls`, one for all gateways and one for each
namespace with models, which ends with the last of them. Pods get a changed Secret within minutes,
and use it for new connections; what signed the old one stays trusted. With certificates of another
issuer there is nothing to do here.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Never

from faasmoe_contracts.atomic_file import write_atomically
from faasmoe_contracts.tls import (
    AUTHORITIES_FILE,
    CERTIFICATE_FILE,
    GATEWAY_NAME,
    KEY_FILE,
    OPERATOR_NAME,
    models_name,
)
from faasmoe_operator.kube.cache import ObjectCache, ObjectChange
from faasmoe_operator.kube.certificates import IssuedCertificate, issue_certificate
from faasmoe_operator.kube.client import KubeApi
from faasmoe_operator.kube.errors import KubeApiError
from faasmoe_operator.kube.manifests.names import (
    FIELD_MANAGER,
    MANAGED_BY_LABEL,
    MODELS_TLS_SECRET,
)
from faasmoe_operator.kube.types import MOEMODEL, SECRET, Object

logger = logging.getLogger(__name__)

PERIOD_S = 60.0
RETRY_S = 5.0
REWRITE_S = 600.0  # Secrets are not watched: a deleted one is written again
SECRET_TYPE = "kubernetes.io/tls"


@dataclass(frozen=True, slots=True)
class _Written:
    secret: Object
    at_s: float


class TlsSecrets:
    """Certificates of the operator's own authority.

    Args:
        api: the API server.
        cache: has the models.
        root_key: the operator's root key.
        folder: the operator's own folder.
        namespace: the operator's namespace.
        gateway_secret: name of the gateways' Secret; None if no gateway runs.
        clock: monotonic clock, in seconds.
        wall_clock: Unix time, in seconds.
    """

    def __init__(
        self,
        api: KubeApi,
        cache: ObjectCache,
        root_key: bytes,
        *,
        folder: Path,
        namespace: str,
        gateway_secret: str | None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._api, self._cache = api, cache
        self._root_key = root_key
        self._folder = folder
        self._namespace = namespace
        self._gateway_secret = gateway_secret
        self._clock, self._wall_clock = clock, wall_clock
        self._own: IssuedCertificate | None = None
        self._written: dict[tuple[str, str], _Written] = {}  # by namespace and name
        self._is_changed = asyncio.Event()
        cache.add_event_handler(self._on_change)

    def write_folder(self) -> None:
        """Write the operator's own certificate if another one is due; raises OSError."""
        due = issue_certificate(self._root_key, "operator", [OPERATOR_NAME], self._wall_clock())
        if due == self._own:
            return
        for name, content in _files(due).items():
            write_atomically(self._folder / name, content, 0o600)
        self._own = due

    async def run(self) -> Never:
        """Write what is due until cancelled."""
        while True:
            self._is_changed.clear()
            is_complete = await self.sync()
            with suppress(TimeoutError):
                async with asyncio.timeout(PERIOD_S if is_complete else RETRY_S):
                    await self._is_changed.wait()

    async def sync(self) -> bool:
        """Write what is due; return whether all of it could be written."""
        self.write_folder()
        due = {_key(secret): secret for secret in self._secrets()}
        self._written = {key: written for key, written in self._written.items() if key in due}
        is_complete = True
        for key, secret in due.items():
            written, now_s = self._written.get(key), self._clock()
            if written and written.secret == secret and now_s - written.at_s < REWRITE_S:
                continue
            try:
                await self._api.apply(SECRET, secret)
            except KubeApiError as error:
                logger.warning("Secret %s/%s: not written: %s", *key, error)
                is_complete = False
                continue
            self._written[key] = _Written(secret, now_s)
        return is_complete

    def _secrets(self) -> Iterable[Object]:
        """Return the Secrets that are due now."""
        now_s = self._wall_clock()
        if self._gateway_secret is not None:
            issued = issue_certificate(self._root_key, "gateway", [GATEWAY_NAME], now_s)
            yield _secret(self._namespace, self._gateway_secret, issued)
        by_namespace: dict[str, list[Object]] = {}
        for model in self._cache.list_all(MOEMODEL):
            if "deletionTimestamp" not in model["metadata"]:
                by_namespace.setdefault(model["metadata"]["namespace"], []).append(model)
        for namespace, models in sorted(by_namespace.items()):
            owner = f"namespace:{namespace}"
            issued = issue_certificate(self._root_key, owner, [models_name(namespace)], now_s)
            yield _secret(namespace, MODELS_TLS_SECRET, issued, owners=models)

    def _on_change(self, change: ObjectChange) -> None:
        if change.kind == MOEMODEL:
            self._is_changed.set()


def _files(issued: IssuedCertificate) -> dict[str, bytes]:
    return {
        AUTHORITIES_FILE: issued.authorities,
        CERTIFICATE_FILE: issued.certificate,
        KEY_FILE: issued.key,
    }


def _secret(
    namespace: str, name: str, issued: IssuedCertificate, *, owners: Sequence[Object] = ()
) -> Object:
    labels = {"app.kubernetes.io/name": "faasmoe", MANAGED_BY_LABEL: FIELD_MANAGER}
    metadata: Object = {"name": name, "namespace": namespace, "labels": labels}
    if owners:
        metadata["ownerReferences"] = sorted(map(_owner_reference, owners), key=lambda r: r["uid"])
    return {
        "apiVersion": SECRET.api_version,
        "kind": SECRET.name,
        "metadata": metadata,
        "type": SECRET_TYPE,
        "data": {n: base64.b64encode(content).decode() for n, content in _files(issued).items()},
    }


def _owner_reference(model: Object) -> Object:
    metadata = model["metadata"]
    return {
        "apiVersion": MOEMODEL.api_version,
        "kind": MOEMODEL.name,
        "name": metadata["name"],
        "uid": metadata["uid"],
    }


def _key(secret: Object) -> tuple[str, str]:
    return secret["metadata"]["namespace"], secret["metadata"]["name"]
