"""The store: the claim that holds it, and the Job that prepares it."""

from __future__ import annotations

from faasmoe_operator.kube.manifests.context import ModelContext, new_object
from faasmoe_operator.kube.manifests.names import TEMPLATE_LABEL, Component, store_name
from faasmoe_operator.kube.manifests.pods import (
    OFFLINE_ENV,
    STORE_MOUNT_PATH,
    TMP_MOUNT_PATH,
    checkpoint_source,
    container_security_context,
    env_vars,
    image_fields,
    merge_env_vars,
    pod_hash,
    pod_template,
    router_env_overrides,
    source_mounts,
    source_volumes,
    store_claim_name,
    store_mount,
    store_path,
    store_volume,
    template_mounts,
    tmp_mount,
    tmp_volume,
)
from faasmoe_operator.kube.manifests.resources import with_overrides
from faasmoe_operator.kube.types import JOB, PERSISTENT_VOLUME_CLAIM, Object

PREPARE_CONTAINER = "prepare"
EXIT_PERMANENT_FAILURE = 2
"""Exit status of a failure that a retry cannot fix."""
TERMINATION_MESSAGE_PATH = "/dev/termination-log"
BACKOFF_LIMIT = 3
TERMINATION_GRACE_S = 30
CA_VOLUME = "ca-bundle"
CA_MOUNT_PATH = "/etc/faasmoe/ca"
CA_FILE_NAME = "ca.crt"
PREPARE_RESOURCES = {
    # The Job holds one tensor at a time, far less than the checkpoint, but an experts tensor can
    # have several GiB. Sizes are not known before the Job runs; `store.resources` overrides this.
    "requests": {"cpu": "1", "memory": "2Gi"},
    "limits": {"cpu": "4", "memory": "16Gi"},
}


def store_claim(ctx: ModelContext) -> Object | None:
    """Return the model's own claim; None if the spec names an existing one, or an image."""
    store = ctx.spec.store
    if store.claim_name is not None or store.image is not None:
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
        PERSISTENT_VOLUME_CLAIM,
        store_name(ctx.name),
        component=Component.STORE,
        owned=store.reclaim_policy == "Delete",
        spec=spec,
    )


def store_job(ctx: ModelContext) -> Object:
    """Return the Job; a label has the hash of its pod template, which is immutable."""
    template = _template(ctx)
    return new_object(
        ctx,
        JOB,
        store_name(ctx.name),
        component=Component.STORE,
        extra_labels={TEMPLATE_LABEL: pod_hash(template)},
        spec={
            "suspend": ctx.spec.suspend and ctx.summary is None,
            "completions": 1,
            "parallelism": 1,
            "backoffLimit": BACKOFF_LIMIT,
            # Two pods that write one store would block each other by its lock.
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {"rules": _pod_failure_rules()},
            "template": template,
        },
    )


def _pod_failure_rules() -> list[Object]:
    final = {
        "containerName": PREPARE_CONTAINER,
        "operator": "In",
        "values": [EXIT_PERMANENT_FAILURE],
    }
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
        service_account_name=store_name(ctx.name),
        container=_container(ctx),
        volumes=[store_volume(ctx), *source_volumes(ctx), tmp_volume(), *_ca_volumes(ctx)],
        termination_grace_s=TERMINATION_GRACE_S,
    )
    pod["spec"]["restartPolicy"] = "Never"
    return pod


def _container(ctx: ModelContext) -> Object:
    template = ctx.spec.router.template
    return {
        "name": PREPARE_CONTAINER,
        **image_fields(ctx, template, ctx.images.router),
        "command": ["python", "-m", "faasmoe_router.checkpoint", "prepare"],
        "args": _arguments(ctx),
        "env": _environment(ctx),
        "resources": with_overrides(PREPARE_RESOURCES, ctx.spec.store.resources),
        "securityContext": container_security_context(),
        "terminationMessagePath": TERMINATION_MESSAGE_PATH,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            store_mount(read_only=ctx.spec.store.image is not None),
            *source_mounts(ctx),
            tmp_mount(),
            *_ca_mounts(ctx),
            *template_mounts(template),
        ],
    }


def _arguments(ctx: ModelContext) -> list[str]:
    model = ctx.spec.model
    arguments = [
        checkpoint_source(ctx),
        store_path(ctx),
        "--termination-log",
        TERMINATION_MESSAGE_PATH,
    ]
    if ctx.spec.store.image is not None:
        arguments.append("--existing")
    else:
        arguments += ["--mode", "copy"]  # pods mount the store's claim alone
        if _is_downloaded(ctx):
            arguments += ["--discard-download", _download_dir(ctx)]
    if model.revision is not None:
        arguments += ["--revision", model.revision]
    if model.dtype != "auto":
        arguments += ["--dtype", model.dtype]
    if ctx.spec.experts.quantization != "none":
        arguments += ["--quantize", ctx.spec.experts.quantization]
    if ctx.spec.router.quantization != "none":
        arguments += ["--quantize-router", ctx.spec.router.quantization]
    return arguments


def store_names_by_path(ctx: ModelContext) -> dict[str, str]:
    """Return what the spec calls the checkpoint and the store, by their paths in the Job's pod."""
    store = ctx.spec.store
    names = {store_path(ctx): store.source or f"{store_claim_name(ctx)}/{ctx.model.store_sub_path}"}
    if not _is_downloaded(ctx):
        names[checkpoint_source(ctx)] = ctx.spec.model.source
    return names


def _is_downloaded(ctx: ModelContext) -> bool:
    """Return whether the Job downloads the checkpoint, and does not mount it."""
    return ctx.spec.model.claim_path is None and ctx.spec.model.image is None


def _download_dir(ctx: ModelContext) -> str:
    """Return the folder of downloads: in the claim, so that a retry resumes them."""
    return f"{STORE_MOUNT_PATH}/.hub/{ctx.name}"


def _environment(ctx: ModelContext) -> list[Object]:
    defaults = {
        "HOME": TMP_MOUNT_PATH,
        "HF_HOME": _download_dir(ctx),
        "FAASMOE_DOWNLOAD_DIR": _download_dir(ctx),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    if ctx.spec.store.image is not None:  # nothing is downloaded
        defaults = OFFLINE_ENV
    return merge_env_vars(
        env_vars({**defaults, **_ca_env(ctx)}), router_env_overrides(ctx), _hub_token_env(ctx)
    )


def _ca_volumes(ctx: ModelContext) -> list[Object]:
    reference = ctx.spec.model.ca_bundle_ref
    if reference is None:
        return []
    items = [{"key": reference.key, "path": CA_FILE_NAME}]
    return [{"name": CA_VOLUME, "configMap": {"name": reference.name, "items": items}}]


def _ca_mounts(ctx: ModelContext) -> list[Object]:
    if ctx.spec.model.ca_bundle_ref is None:
        return []
    return [{"name": CA_VOLUME, "mountPath": CA_MOUNT_PATH, "readOnly": True}]


def _ca_env(ctx: ModelContext) -> dict[str, str]:
    """Return the variables by which OpenSSL, requests and curl find the certificates."""
    if ctx.spec.model.ca_bundle_ref is None:
        return {}
    path = f"{CA_MOUNT_PATH}/{CA_FILE_NAME}"
    return dict.fromkeys(("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"), path)


def _hub_token_env(ctx: ModelContext) -> list[Object]:
    reference = ctx.spec.model.token_secret_ref
    if reference is None:
        return []
    key = {"name": reference.name, "key": reference.key}
    return [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": key}}]
