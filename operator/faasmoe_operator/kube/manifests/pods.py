"""What the model's three kinds of pods have in common."""

from __future__ import annotations

import hashlib
import json

from faasmoe_operator.kube.kinds import Object
from faasmoe_operator.kube.manifests.context import ModelContext
from faasmoe_operator.kube.manifests.images import pull_secrets
from faasmoe_operator.kube.manifests.names import Component, labels
from faasmoe_operator.kube.manifests.scheduling import scheduling
from faasmoe_operator.kube.manifests.security import pod_security
from faasmoe_operator.spec.pod_template import PodTemplate

HASH_CHARS = 12


def pod_template(
    ctx: ModelContext,
    template: PodTemplate,
    component: Component,
    *,
    account: str,
    container: Object,
    volumes: list[Object],
    grace_s: int,
) -> Object:
    """Return metadata and spec of a pod, ours before the template's where they meet.

    Args:
        ctx: the model.
        template: what the MoEModel says of pods of this kind.
        component: which kind.
        account: name of its ServiceAccount.
        container: its one container.
        volumes: its volumes.
        grace_s: how long it may take to end.
    """
    metadata: Object = {"labels": {**(template.labels or {}), **labels(ctx.name, component)}}
    if template.annotations:
        metadata["annotations"] = dict(template.annotations)
    spec = {
        "serviceAccountName": account,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": pod_security(),
        "terminationGracePeriodSeconds": grace_s,
        "containers": [container],
        "volumes": volumes,
        **pull_secrets(ctx, template),
        **scheduling(ctx, template, component),
    }
    return {"metadata": metadata, "spec": spec}


def pod_hash(pod: Object) -> str:
    """Return what tells a pod, or a pod template, from another one."""
    text = json.dumps(pod, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_CHARS]


def http_probe(path: str, *, period_s: int, failures: int, timeout_s: int = 2) -> Object:
    """Return a probe of a container's port `http`."""
    return {
        "httpGet": {"path": path, "port": "http", "scheme": "HTTP"},
        "periodSeconds": period_s,
        "timeoutSeconds": timeout_s,
        "failureThreshold": failures,
        "successThreshold": 1,
    }
