"""The tenants of a `faasmoe up`: the file that its router reads."""

from __future__ import annotations

import json
import os
from pathlib import Path

from faasmoe_operator.control.deployment import Deployment
from faasmoe_operator.spec.tenants_document import FILE_NAME, tenants_document


def write_tenants(deployment: Deployment, folder: Path) -> Path | None:
    """Write the router's tenants file; None if the model has no tenants and is open to all.

    Args:
        deployment: what is to be served.
        folder: the private folder.
    """
    if not deployment.model.spec.tenants:
        return None
    document = tenants_document(deployment.model, lambda t: str(deployment.keys_path(t)))
    path = folder / FILE_NAME
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(document, file, indent=2)
    return path
