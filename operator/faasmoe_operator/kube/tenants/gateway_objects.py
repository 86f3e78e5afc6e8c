"""The objects of the gateways in the operator's namespace: their Secret, and shares of limits."""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Mapping

from faasmoe_operator.control.lease_book import Shares, parse_shares
from faasmoe_operator.kube.client import KubeApi
from faasmoe_operator.kube.errors import KubeApiError
from faasmoe_operator.kube.manifests.names import FIELD_MANAGER, MANAGED_BY_LABEL
from faasmoe_operator.kube.types import CONFIG_MAP, POD, SECRET, Kind, Object

logger = logging.getLogger(__name__)

TOKEN_KEY = "token"
FILE_KEY = "gateway.json"
SHARES_KEY = "shares.json"
MAX_FILE_BYTES = 700_000  # in base64 within the 1 MiB of a Secret


class GatewayObjects:
    """Reads and writes them.

    The Secret is what a gateway starts with: its token, and the file as it was last. Shares must
    outlive the operator, since gateways may use them while it is away.

    Args:
        api: the API server.
        namespace: the operator's namespace.
        name: name of the Secret, and the beginning of that of the ConfigMap.
    """

    def __init__(self, api: KubeApi, *, namespace: str, name: str) -> None:
        self._api = api
        self._namespace = namespace
        self._name = name
        self._shares_name = f"{name}-shares"

    async def write_secret(self, token: str, file: bytes) -> None:
        """Replace the Secret; raises KubeApiError.

        A file that is too large is left out: gateways start with the last one, and get this one
        once they are connected.
        """
        data = {TOKEN_KEY: base64.b64encode(token.encode()).decode()}
        if len(file) <= MAX_FILE_BYTES:
            data[FILE_KEY] = base64.b64encode(file).decode()
        else:
            logger.error(
                "Secret %s: the gateways' file has %d bytes, expected at most %d: gateways start "
                "without it",
                self._name,
                len(file),
                MAX_FILE_BYTES,
            )
            data[FILE_KEY] = base64.b64encode(EMPTY_FILE).decode()
        await self._api.apply(SECRET, self._object(SECRET, self._name, data))

    async def read_shares(self) -> Shares | None:
        """Return the saved shares; None if there are none; raises KubeApiError, ValueError."""
        found = await self._api.get(CONFIG_MAP, self._namespace, self._shares_name)
        text = ((found or {}).get("data") or {}).get(SHARES_KEY)
        return None if text is None else parse_shares(text)

    async def write_shares(self, shares: Shares) -> None:
        """Save shares; raises OSError if they cannot be saved."""
        data = {SHARES_KEY: json.dumps(shares)}
        try:
            await self._api.apply(CONFIG_MAP, self._object(CONFIG_MAP, self._shares_name, data))
        except KubeApiError as error:
            raise OSError(f"shares of limits are not saved: {error}") from error

    async def has_pod(self, name: str) -> bool:
        """Return whether there is a pod of this name; raises KubeApiError."""
        return await self._api.get(POD, self._namespace, name) is not None

    def _object(self, kind: Kind, name: str, data: Mapping[str, str]) -> Object:
        labels = {
            "app.kubernetes.io/name": "faasmoe",
            "app.kubernetes.io/component": "gateway",
            MANAGED_BY_LABEL: FIELD_MANAGER,
        }
        return {
            "apiVersion": kind.api_version,
            "kind": kind.name,
            "metadata": {"name": name, "namespace": self._namespace, "labels": labels},
            "data": dict(data),
        }


EMPTY_FILE = b'{"version": 1, "models": [], "tenants": [], "is_closed": true}'
