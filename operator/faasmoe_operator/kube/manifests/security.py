"""What a pod may do: the `restricted` Pod Security Standard, and nothing of the API."""

from __future__ import annotations

from faasmoe_operator.kube.kinds import SERVICE_ACCOUNT, Object
from faasmoe_operator.kube.manifests.context import ModelContext
from faasmoe_operator.kube.manifests.names import Component
from faasmoe_operator.kube.manifests.objects import new_object

USER_ID = 65532
"""The user of the images; it owns nothing in them."""


def pod_security() -> Object:
    """Return a pod's security context; the group is what makes a claim writable."""
    return {
        "runAsNonRoot": True,
        "runAsUser": USER_ID,
        "runAsGroup": USER_ID,
        "fsGroup": USER_ID,
        # Else every start would walk over all files of the store.
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def container_security() -> Object:
    """Return a container's security context."""
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "privileged": False,
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
    }


def service_account(ctx: ModelContext, name: str, component: Component) -> Object:
    """Return an account that has no rights and of which no pod gets a token."""
    return new_object(
        ctx, SERVICE_ACCOUNT, name, component=component, automountServiceAccountToken=False
    )
