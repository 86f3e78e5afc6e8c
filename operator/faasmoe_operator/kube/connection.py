"""Where the API server is and who we are there: a pod's service account, or KUBECONFIG."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from kubernetes.aio import config
from kubernetes.aio.client.configuration import Configuration

from faasmoe_operator.errors import FaasmoeError

SERVICE_ACCOUNT_VARIABLE = "KUBERNETES_SERVICE_HOST"
MAX_CONNECTIONS = 32


class ConnectionConfigError(FaasmoeError):
    """No way to the API server is configured, or not one that works."""


async def load_connection(env: Mapping[str, str] = os.environ) -> Configuration:
    """Return how to reach the API server; raises ConnectionConfigError.

    KUBECONFIG goes first, as an operator in a pod has none unless somebody meant it.
    """
    configuration = Configuration(connection_pool_maxsize=MAX_CONNECTIONS)
    try:
        if paths := kubeconfig(env):
            await config.load_kube_config(
                config_file=paths, client_configuration=configuration, persist_config=False
            )
        else:
            config.load_incluster_config(client_configuration=configuration)
    except (config.ConfigException, OSError) as error:
        raise ConnectionConfigError(f"no way to the API server: {error}") from error
    return configuration


def kubeconfig(env: Mapping[str, str] = os.environ) -> str | None:
    """Return the kubeconfig files to read, joined by colons; None in a pod."""
    if given := env.get("KUBECONFIG"):
        return given
    if env.get(SERVICE_ACCOUNT_VARIABLE):
        return None
    return str(Path.home() / ".kube" / "config")
