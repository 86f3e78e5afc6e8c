"""The CustomResourceDefinition of the MoEModel, made from the pydantic models.

What pydantic checks, the API server checks: types and bounds by the schema, rules over several
fields by CEL (`extensions.py`). Defaults are the schema's, so that an object shows what holds.
"""

from __future__ import annotations

from typing import Any

import yaml

from faasmoe_operator.spec.extensions import VALIDATIONS, cel
from faasmoe_operator.spec.moemodel import API_VERSION, KIND, ModelSpec
from faasmoe_operator.spec.patterns import SERVICE_NAME
from faasmoe_operator.spec.status import MoEModelStatus
from faasmoe_operator.spec.structural import structural_schema

PLURAL = "moemodels"
GROUP, VERSION = API_VERSION.split("/")
NAME = f"{PLURAL}.{GROUP}"
FILE_NAME = f"{GROUP}_{PLURAL}.yaml"
MAX_NAME = 63
HEADER = "# Written by `faasmoe crd` from the models in operator/faasmoe_operator/spec.\n"

_READY = '.status.conditions[?(@.type=="Ready")]'
_COLUMNS = (
    ("URL", "string", ".status.url", "OpenAI base URL, less its /v1"),
    ("Model", "string", ".spec.model.source", "where the checkpoint comes from"),
    ("Ready", "string", f"{_READY}.status", "whether requests are answered"),
    ("Reason", "string", f"{_READY}.reason", "why, or why not"),
    ("Functions", "integer", ".status.functions.total", "expert functions"),
    ("Active", "integer", ".status.functions.active", "functions with a ready replica"),
    ("Age", "date", ".metadata.creationTimestamp", "since when there is this object"),
)


def crd() -> dict[str, Any]:
    """Return the CustomResourceDefinition."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": NAME, "labels": {"app.kubernetes.io/part-of": "faasmoe"}},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": KIND.lower(),
                "shortNames": ["moem"],
                "categories": ["moe"],
            },
            "versions": [_version()],
        },
    }


def crd_yaml() -> str:
    """Return the CustomResourceDefinition as the text of its file."""
    return HEADER + yaml.dump(crd(), Dumper=_Dumper, sort_keys=False, width=100)


def _version() -> dict[str, Any]:
    names = ("name", "type", "jsonPath", "description")
    columns = [dict(zip(names, column, strict=True)) for column in _COLUMNS]
    return {
        "name": VERSION,
        "served": True,
        "storage": True,
        "additionalPrinterColumns": columns,
        "subresources": {
            "status": {},
            "scale": {
                "specReplicasPath": ".spec.router.replicas",
                "statusReplicasPath": ".status.router.replicas",
                "labelSelectorPath": ".status.router.selector",
            },
        },
        "schema": {"openAPIV3Schema": _root()},
    }


def _root() -> dict[str, Any]:
    name = cel(
        f"self.metadata.name.matches(r'{SERVICE_NAME}')",
        "expected metadata.name to be small letters, digits and '-', a letter first: Services are "
        "named after it",
    )
    return {
        "description": "One Mixture-of-Experts model and how it is served.",
        "type": "object",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {
                "type": "object",
                "properties": {"name": {"type": "string", "maxLength": MAX_NAME}},
            },
            "spec": structural_schema(ModelSpec),
            "status": structural_schema(MoEModelStatus),
        },
        VALIDATIONS: [name],
    }


class _Dumper(yaml.SafeDumper):
    """Writes what is the same in several places in each of them."""

    def ignore_aliases(self, data: Any) -> bool:
        return True
