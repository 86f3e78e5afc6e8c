"""MoEModel files of tests: the document around a spec, and tenants with one key each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def write_moemodel(file: Path, spec: Mapping[str, Any], *, name: str = "tiny") -> Path:
    """Write a MoEModel with a spec; return the file."""
    document = {
        "apiVersion": "faasmoe.dev/v1alpha1",
        "kind": "MoEModel",
        "metadata": {"name": name},
        "spec": dict(spec),
    }
    file.write_text(json.dumps(document))  # JSON is YAML
    return file


def write_tenants(folder: Path, names: Iterable[str]) -> list[dict[str, str]]:
    """Write the key NAME-key of each tenant below a folder; return `spec.tenants`."""
    tenants = []
    for name in names:
        (folder / name).mkdir()
        (folder / name / "key").write_text(f"{name}-key\n")
        tenants.append({"name": name, "apiKeysPath": name})
    return tenants
