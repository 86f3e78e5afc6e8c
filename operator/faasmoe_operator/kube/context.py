"""The operator's root key, and what each model's parts know each other by.

Tokens are derived and not stored: a new operator process knows them all, and no Secret but the root
key's own is ever read. Whoever lost the root key gets new tokens: the Secrets, which carry a hash
of theirs in the name, are made anew and the pods that name them replaced.

What all models of one operator have in common, and one model in the midst of it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field

from faasmoe_operator.api.v1alpha1 import MoEModel
from faasmoe_operator.errors import FaasmoeError
from faasmoe_operator.kube.client import KubeApi
from faasmoe_operator.kube.errors import Conflict
from faasmoe_operator.kube.manifests import ControlEndpoint, ControlSecrets, Images, ModelContext
from faasmoe_operator.kube.manifests.names import FIELD_MANAGER, MANAGED_BY_LABEL
from faasmoe_operator.kube.types import SECRET, Object

ROOT_KEY_BYTES = 32
ROOT_KEY_FIELD = "root-key"


class RootKeyError(FaasmoeError):
    """The root key's Secret is not what it should be."""


async def load_root_key(api: KubeApi, *, namespace: str, name: str) -> bytes:
    """Return the root key, made if there is none; raises ApiError or RootKeyError."""
    if (secret := await api.get(SECRET, namespace, name)) is None:
        try:
            secret = await api.create(SECRET, _new_root_key_secret(namespace, name))
        except Conflict:
            secret = await api.get(SECRET, namespace, name)
    if secret is None:
        raise RootKeyError(f"Secret {namespace}/{name}: deleted while it was read")
    return _decode_root_key(secret, where=f"Secret {namespace}/{name}")


def derive_model_secrets(root_key: bytes, uid: str) -> ControlSecrets:
    """Return what the parts of the model with this uid know each other by."""
    return ControlSecrets(
        _derive(root_key, f"token:{uid}"), _derive(root_key, f"function-key:{uid}")
    )


def _derive(root_key: bytes, purpose: str) -> str:
    return hmac.new(root_key, purpose.encode(), hashlib.sha256).hexdigest()


def _new_root_key_secret(namespace: str, name: str) -> Object:
    key = base64.b64encode(secrets.token_bytes(ROOT_KEY_BYTES)).decode()
    labels = {"app.kubernetes.io/name": "faasmoe", MANAGED_BY_LABEL: FIELD_MANAGER}
    return {
        "apiVersion": SECRET.api_version,
        "kind": SECRET.name,
        "metadata": {"name": name, "namespace": namespace, "labels": labels},
        "type": "Opaque",
        "immutable": True,
        "data": {ROOT_KEY_FIELD: key},
    }


def _decode_root_key(secret: Object, *, where: str) -> bytes:
    text = (secret.get("data") or {}).get(ROOT_KEY_FIELD)
    try:
        key = base64.b64decode(text or "", validate=True)
    except binascii.Error:
        key = b""
    if len(key) < ROOT_KEY_BYTES:
        expected = f"{ROOT_KEY_BYTES} bytes or more in base64; delete the Secret to have one made"
        raise RootKeyError(
            f"{where}: data.{ROOT_KEY_FIELD}: got {len(key)} bytes, expected {expected}"
        )
    return key


@dataclass(frozen=True, slots=True)
class OperatorContext:
    """What surrounds every model.

    Attributes:
        images: what pods run.
        control: the operator's control API.
        root_key: what tokens are derived from.
        served: tells the optional APIs that the cluster serves now, such as
            "gateway.networking.k8s.io/v1".
    """

    images: Images
    control: ControlEndpoint
    root_key: bytes = field(repr=False)
    served_apis: Callable[[], frozenset[str]] = frozenset

    def model_context(self, model: MoEModel, obj: Object) -> ModelContext:
        """Return a model with what surrounds it.

        Args:
            model: what is asked for.
            obj: the object that says so.
        """
        metadata = obj["metadata"]
        return ModelContext(
            model=model,
            namespace=metadata["namespace"],
            uid=metadata["uid"],
            generation=metadata.get("generation", 0),
            images=self.images,
            control=self.control,
            secrets=derive_model_secrets(self.root_key, metadata["uid"]),
            api=self.served_apis(),
        )
