"""Operator-wide context: images, control API, optional APIs, and secrets derived from a root key.

A model's token and function key are HMACs of its uid under the operator's root key. So a new
operator process knows them all, and no Secret other than the root key's is ever read. A new root
key yields new tokens: the Secrets, which have a hash of the token in their names, are created anew
and the pods that refer to them are replaced.
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
from faasmoe_operator.api.v1alpha1.tenants import TenantSpec
from faasmoe_operator.errors import FaasmoeError
from faasmoe_operator.kube.client import KubeApi
from faasmoe_operator.kube.errors import Conflict
from faasmoe_operator.kube.manifests import ControlEndpoint, ControlSecrets, Images, ModelContext
from faasmoe_operator.kube.manifests.context import USER_ID, GatewayPods
from faasmoe_operator.kube.manifests.names import FIELD_MANAGER, MANAGED_BY_LABEL
from faasmoe_operator.kube.types import SECRET, ModelKey, Object

ROOT_KEY_BYTES = 32
ROOT_KEY_FIELD = "root-key"


class RootKeyError(FaasmoeError):
    """The Secret of the root key is invalid."""


async def load_root_key(api: KubeApi, *, namespace: str, name: str) -> bytes:
    """Return the root key, creating its Secret if needed; raises KubeApiError, RootKeyError."""
    if (secret := await api.get(SECRET, namespace, name)) is None:
        try:
            secret = await api.create(SECRET, _new_root_key_secret(namespace, name))
        except Conflict:
            secret = await api.get(SECRET, namespace, name)
    if secret is None:
        raise RootKeyError(f"Secret {namespace}/{name}: deleted while it was read")
    return _decode_root_key(secret, where=f"Secret {namespace}/{name}")


def derive_model_secrets(
    root_key: bytes, uid: str, *, has_gateways: bool = False
) -> ControlSecrets:
    """Return the secrets of the model with this uid."""
    return ControlSecrets(
        _derive(root_key, f"token:{uid}"),
        _derive(root_key, f"function-key:{uid}"),
        derive_front_token(root_key, uid) if has_gateways else "",
    )


def derive_front_token(root_key: bytes, uid: str) -> str:
    """Return what gateways show the routers of the model with this uid."""
    return _derive(root_key, f"front:{uid}")


def derive_gateway_token(root_key: bytes) -> str:
    """Return what gateways show the operator."""
    return _derive(root_key, "gateway")


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
        expected = f"{ROOT_KEY_BYTES} bytes or more in base64; delete the Secret to regenerate it"
        raise RootKeyError(
            f"{where}: data.{ROOT_KEY_FIELD}: got {len(key)} bytes, expected {expected}"
        )
    return key


@dataclass(frozen=True, slots=True)
class OperatorContext:
    """What all models of an operator have in common.

    Attributes:
        images: default images of the pods.
        control: the operator's control API.
        root_key: the key that tokens are derived from.
        served_apis: returns the optional APIs that the cluster serves, such as
            "gateway.networking.k8s.io/v1".
        user_id: user and group of models' pods; None if the platform assigns them.
        can_resize: whether the cluster resizes pods in place.
        gateways: the gateways' pods; None if no gateway runs.
        router_tenants: returns the Tenants that may use a model.
        scaled_routers: returns how many routers of a model should run by its requests; None for
            one whose requests are not counted.
        tls_secret: name of the Secret, in each namespace, with the certificate of its models; None
            for pods without TLS.
    """

    images: Images
    control: ControlEndpoint
    root_key: bytes = field(repr=False)
    served_apis: Callable[[], frozenset[str]] = frozenset
    user_id: int | None = USER_ID
    can_resize: bool = False
    gateways: GatewayPods | None = None
    router_tenants: Callable[[ModelKey], tuple[TenantSpec, ...]] = lambda _: ()
    scaled_routers: Callable[[ModelKey], int | None] = lambda _: None
    tls_secret: str | None = None

    def model_context(self, model: MoEModel, obj: Object) -> ModelContext:
        """Return the context of one model.

        Args:
            model: the parsed MoEModel.
            obj: its API object.
        """
        metadata = obj["metadata"]
        key = ModelKey(metadata["namespace"], metadata["name"])
        return ModelContext(
            model=model,
            namespace=metadata["namespace"],
            uid=metadata["uid"],
            generation=metadata.get("generation", 0),
            images=self.images,
            control=self.control,
            secrets=derive_model_secrets(
                self.root_key, metadata["uid"], has_gateways=self.gateways is not None
            ),
            served_apis=self.served_apis(),
            user_id=self.user_id,
            can_resize=self.can_resize,
            gateways=self.gateways,
            tenants=self.router_tenants(key),
            scaled_routers=self.scaled_routers(key),
            tls_secret=self.tls_secret,
        )
