"""The private files of one `faasmoe up`: model, tenants and keys, as its processes read them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from faasmoe_operator.api.v1alpha1 import MoEModel
from faasmoe_operator.api.v1alpha1.tenants import TenantSpec
from faasmoe_operator.api.v1alpha1.tenants_file import TENANTS_FILE_NAME, build_tenants_file
from faasmoe_operator.control.local_model import LocalModel

MODEL_FILE_NAME = "model.yaml"
SINGLE_TENANT = "default"
API_KEYS_FOLDER = "api-keys"


def write_model_file(deployment: LocalModel, folder: Path) -> Path:
    """Return the MoEModel file of the control process.

    Args:
        deployment: the model to serve.
        folder: private runtime folder of this instance, where a file is written if the model is not
            what its file holds; paths in it are absolute.
    """
    if not deployment.is_modified:
        return deployment.file
    document = deployment.model.model_dump(mode="json", by_alias=True, exclude_unset=True)
    spec = document["spec"]
    spec["model"]["source"] = deployment.source
    spec.setdefault("store", {})["path"] = str(deployment.store_path)
    for tenant, entry in zip(deployment.model.spec.tenants, spec.get("tenants", ()), strict=True):
        entry["apiKeysPath"] = str(deployment.api_keys_path(tenant))
    path = folder / MODEL_FILE_NAME
    write_private(path, json.dumps(document, indent=2))
    return path


def write_tenants_file(
    deployment: LocalModel, folder: Path, *, api_keys: Sequence[str] = ()
) -> Path | None:
    """Write the tenants file of the router, readable by this user only.

    Args:
        deployment: the model to serve.
        folder: private runtime folder of this instance.
        api_keys: keys of a model without tenants; they become those of one unlimited tenant.

    Returns:
        The file, or None if the model declares no tenants and is open to everyone.
    """
    if api_keys:
        model = _with_single_tenant(deployment.model)
        document = build_tenants_file(
            model.metadata.name,
            model.spec.tenants,
            lambda _: str(write_keys(folder, api_keys)),
        )
    elif deployment.model.spec.tenants:
        document = build_tenants_file(
            deployment.model.metadata.name,
            deployment.model.spec.tenants,
            lambda tenant: str(deployment.api_keys_path(tenant)),
        )
    else:
        return None
    path = folder / TENANTS_FILE_NAME
    write_private(path, json.dumps(document, indent=2))
    return path


def _with_single_tenant(model: MoEModel) -> MoEModel:
    tenant = TenantSpec.model_validate({"name": SINGLE_TENANT, "apiKeysPath": API_KEYS_FOLDER})
    spec = model.spec.model_copy(update={"tenants": (tenant,)})
    return model.model_copy(update={"spec": spec})


def write_keys(folder: Path, api_keys: Sequence[str]) -> Path:
    """Write each key to a file of its own, as a mounted Secret has them; return their folder."""
    path = folder / API_KEYS_FOLDER
    path.mkdir(mode=0o700)
    for index, key in enumerate(api_keys):
        write_private(path / f"key-{index}", key)
    return path


def write_private(path: Path, text: str) -> None:
    """Write a new file that only this user can read."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
