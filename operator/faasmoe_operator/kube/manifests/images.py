"""Which image a container runs, and how nodes get it."""

from __future__ import annotations

from faasmoe_operator.kube.kinds import Object
from faasmoe_operator.kube.manifests.context import ModelContext
from faasmoe_operator.spec.pod_template import PodTemplate


def container_image(ctx: ModelContext, template: PodTemplate, default: str) -> Object:
    """Return a container's image and pull policy: the template's, else the operator's."""
    return {
        "image": template.image or default,
        "imagePullPolicy": template.image_pull_policy or ctx.images.pull_policy,
    }


def pull_secrets(ctx: ModelContext, template: PodTemplate) -> Object:
    """Return the pod's pull secrets: the template's, else the operator's; none is no field."""
    named = [secret.name for secret in template.image_pull_secrets]
    names = named or ctx.images.pull_secrets
    return {"imagePullSecrets": [{"name": name} for name in names]} if names else {}
