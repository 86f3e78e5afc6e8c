"""A sandbox: a bare pod from one template, generic until functions are attached to it.

A pod of another template hash is to be replaced, so the hash covers all of the pod but its name.
"""

from __future__ import annotations

from faasmoe_operator.kube.kinds import POD, Object
from faasmoe_operator.kube.manifests.context import ModelContext
from faasmoe_operator.kube.manifests.environment import OFFLINE, merged, settings, variables
from faasmoe_operator.kube.manifests.images import container_image
from faasmoe_operator.kube.manifests.names import (
    POOL_LABEL,
    TEMPLATE_LABEL,
    Component,
    Pool,
    sandbox_name,
)
from faasmoe_operator.kube.manifests.objects import new_object
from faasmoe_operator.kube.manifests.pods import http_probe, pod_hash, pod_template
from faasmoe_operator.kube.manifests.resources import sandbox_resources
from faasmoe_operator.kube.manifests.secrets import token_variable
from faasmoe_operator.kube.manifests.security import container_security
from faasmoe_operator.kube.manifests.volumes import (
    store_mount,
    store_volume,
    temporary_mount,
    temporary_volume,
)
from faasmoe_operator.platforms.zygote import ENVIRONMENT

CONTAINER = "sandbox"
PORT = 9090
GRACE_S = 30
START_S = 300


def sandbox_pod(ctx: ModelContext, *, name: str) -> Object:
    """Return a generic sandbox; raises PlanError for a granularity that the model cannot have."""
    return _pod(ctx, name=name, template_hash=sandbox_template_hash(ctx))


def sandbox_template_hash(ctx: ModelContext) -> str:
    """Return what sandboxes of this template have in common; raises PlanError."""
    return pod_hash(_pod(ctx, name="", template_hash=""))


def _pod(ctx: ModelContext, *, name: str, template_hash: str) -> Object:
    pod = pod_template(
        ctx,
        ctx.spec.experts.template,
        Component.SANDBOX,
        account=sandbox_name(ctx.name),
        container=_container(ctx),
        volumes=[store_volume(ctx), temporary_volume()],
        grace_s=GRACE_S,
    )
    # One that has ended holds no functions any more: it is replaced, not started again.
    pod["spec"]["restartPolicy"] = "Never"
    return new_object(
        ctx,
        POD,
        name,
        component=Component.SANDBOX,
        more_labels={
            **pod["metadata"]["labels"],
            TEMPLATE_LABEL: template_hash,
            POOL_LABEL: Pool.WARM.value,
        },
        annotations=pod["metadata"].get("annotations"),
        spec=pod["spec"],
    )


def _container(ctx: ModelContext) -> Object:
    template = ctx.spec.experts.template
    return {
        "name": CONTAINER,
        **container_image(ctx, template, ctx.images.expert),
        "command": ["python", "-m", "faasmoe_expert"],
        "env": _environment(ctx),
        "ports": [{"name": "http", "containerPort": PORT, "protocol": "TCP"}],
        "resources": sandbox_resources(ctx),
        "securityContext": container_security(),
        "startupProbe": http_probe("/healthz", period_s=1, failures=START_S),
        "livenessProbe": http_probe("/healthz", period_s=10, failures=6, timeout_s=5),
        "readinessProbe": http_probe("/readyz", period_s=5, failures=2),
        "volumeMounts": [store_mount(read_only=True), temporary_mount()],
    }


def _environment(ctx: ModelContext) -> list[Object]:
    experts = ctx.spec.experts
    own = settings(
        {
            "HOST": "0.0.0.0",
            "PORT": PORT,
            "CAPACITY": experts.functions_per_sandbox,
            "DEVICE": experts.device,
            "THREADS": experts.threads,
        }
    )
    name = {"name": "FAASMOE_SANDBOX_ID", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}
    given = [variable.to_object() for variable in experts.template.env]
    return merged(variables({**OFFLINE, **ENVIRONMENT}), given, own, [name, token_variable(ctx)])
