"""Creates tenants in files of `faasmoe up`, and their API keys."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from faasmoe_contracts.api_keys import MAX_KEYS
from faasmoe_operator.api.v1alpha1 import MoEModelError
from faasmoe_operator.api.v1alpha1.tenant import TENANT_KIND, Tenant
from faasmoe_operator.api.v1alpha1.validation import format_validation_errors
from faasmoe_operator.cli.deployment import Deployment, LocalTenant
from faasmoe_operator.errors import CommandError

KEY_PREFIX = "sk-"
KEY_BYTES = 32


@dataclass(frozen=True, slots=True)
class CreatedKey:
    """A new API key: the file that holds it, and the key itself."""

    path: Path
    key: str


def create_tenant(
    files: Sequence[Path], name: str, models: Sequence[str], spec: Mapping[str, Any]
) -> tuple[Path, CreatedKey]:
    """Add a tenant with one key to the last of the files, or to a new file of a folder.

    Args:
        files: files and folders as given to `faasmoe up`.
        name: the tenant's name.
        models: the models that it may use.
        spec: further fields of its spec.

    Returns:
        The file that holds it now, and its key.

    Raises:
        MoEModelError: the tenant, or what the files hold, is invalid.
        CommandError: something cannot be written, or is there already.
    """
    deployment = Deployment.load(files)
    path = _tenant_file(files[-1], name)
    document = {
        "apiVersion": "faasmoe.dev/v1alpha1",
        "kind": TENANT_KIND,
        "metadata": {"name": name},
        "spec": {
            "apiKeysPath": f"keys/{name}",
            "models": [{"name": model} for model in models],
            **spec,
        },
    }
    try:
        tenant = LocalTenant(path, Tenant.model_validate(document), f"{TENANT_KIND} {name}")
    except ValidationError as error:
        raise MoEModelError(str(path), format_validation_errors(error, Tenant)) from error
    replace(deployment, tenants=(*deployment.tenants, tenant)).check()
    key = create_key(tenant.keys_path, None)
    text = yaml.safe_dump(document, sort_keys=False)
    try:
        separator = "---\n" if path.exists() else ""
        with path.open("a", encoding="utf-8") as file:
            file.write(separator + text)
    except OSError as error:
        raise CommandError(f"{path}: cannot be written: {error.strerror}") from error
    return path, key


def create_key(folder: Path, name: str | None) -> CreatedKey:
    """Write a new random key to a file of its own, which this user alone can read.

    Args:
        folder: folder of the tenant's keys; created if it does not exist.
        name: name of the file; None for the first free key-N.

    Raises:
        CommandError: there is such a file, or it cannot be written.
    """
    key = KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)
    free = (f"key-{n}" for n in range(1, MAX_KEYS + 2) if not (folder / f"key-{n}").exists())
    path = folder / (name or next(free))
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise CommandError(f"{path}: exists already, expected a new name") from None
    except OSError as error:
        raise CommandError(f"{path}: cannot be written: {error.strerror}") from error
    with os.fdopen(descriptor, "w") as file:
        file.write(key)
    return CreatedKey(path, key)


def revoke_keys(folder: Path, names: Sequence[str]) -> None:
    """Remove keys; raises CommandError, before any is removed, for a name that is none."""
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise CommandError(f"--revoke: got {name!r}, expected the name of a key in {folder}")
    for name in names:
        try:
            (folder / name).unlink()
        except OSError as error:
            raise CommandError(f"{folder / name}: cannot be removed: {error.strerror}") from error


def _tenant_file(path: Path, name: str) -> Path:
    if path.is_dir():
        path = path / f"tenant-{name}.yaml"
        if path.exists():
            raise CommandError(f"{path}: exists already, expected another tenant")
        return path
    if path.suffix == ".json":
        raise CommandError(f"-f: got {path} last, expected a YAML file or a folder to write to")
    return path
