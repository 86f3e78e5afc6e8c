"""The store: the claim that it lies in, and the Job that prepares it."""

from __future__ import annotations

from faasmoe_operator.kube.kinds import CLAIM, JOB, Object
from faasmoe_operator.kube.manifests.context import ModelContext
from faasmoe_operator.kube.manifests.environment import merged, router_additions, variables
from faasmoe_operator.kube.manifests.images import container_image
from faasmoe_operator.kube.manifests.names import TEMPLATE_LABEL, Component, store_name
from faasmoe_operator.kube.manifests.objects import new_object
from faasmoe_operator.kube.manifests.pods import pod_hash, pod_template
from faasmoe_operator.kube.manifests.resources import overridden
from faasmoe_operator.kube.manifests.security import container_security
from faasmoe_operator.kube.manifests.volumes import (
    STORE_FOLDER,
    TEMPORARY_FOLDER,
    source_argument,
    source_mounts,
    source_volumes,
    store_mount,
    store_path,
    store_volume,
    temporary_mount,
    temporary_volume,
)

CONTAINER = "prepare"
EXIT_FINAL = 2
"""The exit status of what trying again cannot mend."""
TERMINATION_LOG = "/dev/termination-log"
BACKOFF_LIMIT = 3
GRACE_S = 30
RESOURCES = {
    # One tensor at a time: far below the checkpoint's size, but an experts tensor can have GiBs.
    # What is not told before the Job has run cannot be computed: `store.resources` overrides it.
    "requests": {"cpu": "1", "memory": "2Gi"},
    "limits": {"cpu": "4", "memory": "16Gi"},
}


def store_claim(ctx: ModelContext) -> Object | None:
    """Return the model's own claim; None where another one is named."""
    store = ctx.spec.store
    if store.claim_name is not None:
        return None
    spec: Object = {
        "accessModes": [store.access_mode],
        "resources": {"requests": {"storage": store.size}},
        "volumeMode": "Filesystem",
    }
    if store.storage_class_name is not None:
        spec["storageClassName"] = store.storage_class_name
    return new_object(
        ctx,
        CLAIM,
        store_name(ctx.name),
        component=Component.STORE,
        owned=store.reclaim_policy == "Delete",
        spec=spec,
    )


def store_job(ctx: ModelContext) -> Object:
    """Return the Job; its label tells its pod template, which cannot be changed in place."""
    template = _template(ctx)
    return new_object(
        ctx,
        JOB,
        store_name(ctx.name),
        component=Component.STORE,
        more_labels={TEMPLATE_LABEL: pod_hash(template)},
        spec={
            "suspend": ctx.spec.suspend and ctx.summary is None,
            "completions": 1,
            "parallelism": 1,
            "backoffLimit": BACKOFF_LIMIT,
            # Two that write one store would wait for each other's lock.
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {"rules": _failure_rules()},
            "template": template,
        },
    )


def _failure_rules() -> list[Object]:
    final = {"containerName": CONTAINER, "operator": "In", "values": [EXIT_FINAL]}
    disrupted = {"type": "DisruptionTarget", "status": "True"}
    return [
        {"action": "FailJob", "onExitCodes": final},
        {"action": "Ignore", "onPodConditions": [disrupted]},
    ]


def _template(ctx: ModelContext) -> Object:
    router = ctx.spec.router.template
    pod = pod_template(
        ctx,
        router,
        Component.STORE,
        account=store_name(ctx.name),
        container=_container(ctx),
        volumes=[store_volume(ctx), *source_volumes(ctx), temporary_volume()],
        grace_s=GRACE_S,
    )
    pod["spec"]["restartPolicy"] = "Never"
    return pod


def _container(ctx: ModelContext) -> Object:
    template = ctx.spec.router.template
    return {
        "name": CONTAINER,
        **container_image(ctx, template, ctx.images.router),
        "command": ["python", "-m", "faasmoe_router.checkpoint", "prepare"],
        "args": _arguments(ctx),
        "env": _environment(ctx),
        "resources": overridden(RESOURCES, ctx.spec.store.resources),
        "securityContext": container_security(),
        "terminationMessagePath": TERMINATION_LOG,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [store_mount(read_only=False), *source_mounts(ctx), temporary_mount()],
    }


def _arguments(ctx: ModelContext) -> list[str]:
    model = ctx.spec.model
    arguments = [source_argument(ctx), store_path(ctx), "--termination-log", TERMINATION_LOG]
    if model.claim_path is None:
        arguments += ["--discard-download", _downloads(ctx)]
    if model.revision is not None:
        arguments += ["--revision", model.revision]
    if model.dtype != "auto":
        arguments += ["--dtype", model.dtype]
    return arguments


def _downloads(ctx: ModelContext) -> str:
    """Return where the hub's downloads lie: on the claim, so that a retry goes on with them."""
    return f"{STORE_FOLDER}/.hub/{ctx.name}"


def _environment(ctx: ModelContext) -> list[Object]:
    defaults = {
        "HOME": TEMPORARY_FOLDER,
        "HF_HOME": _downloads(ctx),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    return merged(variables(defaults), router_additions(ctx), _token(ctx))


def _token(ctx: ModelContext) -> list[Object]:
    reference = ctx.spec.model.token_secret_ref
    if reference is None:
        return []
    key = {"name": reference.name, "key": reference.key}
    return [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": key}}]
