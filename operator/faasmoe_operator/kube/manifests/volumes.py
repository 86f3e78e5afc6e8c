"""The volumes of pods: the store's claim, a checkpoint's claim, room for temporary files."""

from __future__ import annotations

from faasmoe_operator.kube.kinds import Object
from faasmoe_operator.kube.manifests.context import ModelContext
from faasmoe_operator.kube.manifests.names import store_name

STORE_FOLDER = "/store"
SOURCE_FOLDER = "/source"
TEMPORARY_FOLDER = "/tmp"
TEMPORARY_SIZE = "2Gi"
STATE_FOLDER = "/var/lib/faasmoe"
STATE_SIZE = "64Mi"


def claim_name(ctx: ModelContext) -> str:
    """Return the claim that the store is in: the one that is named, else the model's own."""
    return ctx.spec.store.claim_name or store_name(ctx.name)


def store_path(ctx: ModelContext) -> str:
    """Return the store's folder as every pod of the model sees it."""
    return f"{STORE_FOLDER}/{ctx.model.store_sub_path}"


def source_argument(ctx: ModelContext) -> str:
    """Return the checkpoint as the store's Job is told it: a path if it is in a claim."""
    place = ctx.spec.model.claim_path
    if place is None:
        return ctx.spec.model.source
    return f"{SOURCE_FOLDER}/{place.claim}/{place.path}".rstrip("/")


def store_volume(ctx: ModelContext) -> Object:
    """Return the volume of the store's claim."""
    # Read-only is each mount's to say: said here, two pods of one node could not share a claim.
    return {"name": "store", "persistentVolumeClaim": {"claimName": claim_name(ctx)}}


def store_mount(*, read_only: bool) -> Object:
    """Return where the claim is mounted."""
    return {"name": "store", "mountPath": STORE_FOLDER, "readOnly": read_only}


def source_volumes(ctx: ModelContext) -> list[Object]:
    """Return the volume of the checkpoint, if it is in a claim."""
    place = ctx.spec.model.claim_path
    if place is None:
        return []
    return [{"name": "source", "persistentVolumeClaim": {"claimName": place.claim}}]


def source_mounts(ctx: ModelContext) -> list[Object]:
    """Return where the checkpoint's claim is mounted, if it is in one."""
    place = ctx.spec.model.claim_path
    if place is None:
        return []
    return [{"name": "source", "mountPath": f"{SOURCE_FOLDER}/{place.claim}", "readOnly": True}]


def temporary_volume() -> Object:
    """Return room for temporary files; the root file system takes none."""
    return {"name": "tmp", "emptyDir": {"sizeLimit": TEMPORARY_SIZE}}


def temporary_mount() -> Object:
    """Return where temporary files go."""
    return {"name": "tmp", "mountPath": TEMPORARY_FOLDER}


def state_volume() -> Object:
    """Return room for what a router keeps over restarts of its container: tenants' accounts.

    It goes with the pod; what is to last longer is scraped as metrics.
    """
    return {"name": "state", "emptyDir": {"sizeLimit": STATE_SIZE}}


def state_mount() -> Object:
    """Return where the router keeps its state."""
    return {"name": "state", "mountPath": STATE_FOLDER}
