"""The operator's root key, and what each model's parts know each other by.

Tokens are derived and not stored: a new operator process knows them all, and no Secret but the root
key's own is ever read. Whoever lost the root key gets new tokens: the Secrets, which carry a hash
of theirs in the name, are made anew and the pods that name them replaced.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets

from faasmoe_operator.errors import FaasmoeError
from faasmoe_operator.kube.api import KubeApi
from faasmoe_operator.kube.errors import Conflict
from faasmoe_operator.kube.kinds import SECRET, Object
from faasmoe_operator.kube.manifests import ControlSecrets
from faasmoe_operator.kube.manifests.names import FIELD_MANAGER, MANAGED_BY_LABEL

KEY_BYTES = 32
FIELD = "root-key"


class RootKeyError(FaasmoeError):
    """The root key's Secret is not what it should be."""


async def root_key(api: KubeApi, *, namespace: str, name: str) -> bytes:
    """Return the root key, made if there is none; raises ApiError or RootKeyError."""
    if (found := await api.get(SECRET, namespace, name)) is None:
        try:
            found = await api.create(SECRET, _secret(namespace, name))
        except Conflict:
            found = await api.get(SECRET, namespace, name)
    if found is None:
        raise RootKeyError(f"Secret {namespace}/{name}: it was there and is gone again")
    return _read(found, where=f"Secret {namespace}/{name}")


def model_secrets(root: bytes, uid: str) -> ControlSecrets:
    """Return what the parts of the model with this uid know each other by."""
    return ControlSecrets(_derived(root, f"token:{uid}"), _derived(root, f"function-key:{uid}"))


def _derived(root: bytes, what: str) -> str:
    return hmac.new(root, what.encode(), hashlib.sha256).hexdigest()


def _secret(namespace: str, name: str) -> Object:
    key = base64.b64encode(secrets.token_bytes(KEY_BYTES)).decode()
    labels = {"app.kubernetes.io/name": "faasmoe", MANAGED_BY_LABEL: FIELD_MANAGER}
    return {
        "apiVersion": SECRET.api_version,
        "kind": SECRET.name,
        "metadata": {"name": name, "namespace": namespace, "labels": labels},
        "type": "Opaque",
        "immutable": True,
        "data": {FIELD: key},
    }


def _read(secret: Object, *, where: str) -> bytes:
    text = (secret.get("data") or {}).get(FIELD)
    try:
        key = base64.b64decode(text or "", validate=True)
    except binascii.Error:
        key = b""
    if len(key) < KEY_BYTES:
        expected = f"{KEY_BYTES} bytes or more in base64; delete the Secret to have one made"
        raise RootKeyError(f"{where}: data.{FIELD}: got {len(key)} bytes, expected {expected}")
    return key
