"""The CustomResourceDefinition of the Tenant, generated as that of the MoEModel is."""

from __future__ import annotations

from typing import Any

from faasmoe_operator.api.v1alpha1.base import VALIDATIONS, cel_rule
from faasmoe_operator.api.v1alpha1.crd import (
    CRD_FILE_NAME,
    GROUP,
    VERSION,
    render_crd_yaml,
    root_schema,
    structural_schema,
)
from faasmoe_operator.api.v1alpha1.tenant import TENANT_KIND, TenantResourceSpec
from faasmoe_operator.api.v1alpha1.tenant_status import TenantResourceStatus

TENANT_PLURAL = "tenants"
TENANT_CRD_FILE_NAME = f"{GROUP}_{TENANT_PLURAL}.yaml"
_READY = '.status.conditions[?(@.type=="Ready")]'
_PRINTER_COLUMNS = (
    ("Weight", "integer", ".spec.weight", "relative share of the tokens under contention"),
    ("Priority", "integer", ".spec.priority", "tenants of higher priority are served first"),
    ("Host", "string", ".spec.host", "host name of its requests"),
    ("Keys", "integer", ".status.keys", "API keys that are accepted"),
    ("Ready", "string", f"{_READY}.status", "whether it may call all of its models"),
    ("Reason", "string", f"{_READY}.reason", "why not"),
    ("Age", "date", ".metadata.creationTimestamp", "time since creation"),
)


def build_tenant_crd() -> dict[str, Any]:
    """Return the CustomResourceDefinition."""
    names = ("name", "type", "jsonPath", "description")
    name_rule = cel_rule(
        "self.metadata.name.matches(r'^[a-z0-9]([-a-z0-9]*[a-z0-9])?$')",
        "expected metadata.name to be lowercase letters, digits and '-': it is in the tenant's URL",
    )
    schema = root_schema(
        "A tenant: who may call which models, how much and with which keys.",
        "Name of the tenant, the first segment of its URL.",
        spec=structural_schema(TenantResourceSpec),
        status=structural_schema(TenantResourceStatus),
    )
    version = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "subresources": {"status": {}},
        "additionalPrinterColumns": [
            dict(zip(names, column, strict=True)) for column in _PRINTER_COLUMNS
        ],
        "schema": {"openAPIV3Schema": schema | {VALIDATIONS: [name_rule]}},
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": f"{TENANT_PLURAL}.{GROUP}",
            "labels": {"app.kubernetes.io/part-of": "faasmoe"},
        },
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": TENANT_KIND,
                "listKind": f"{TENANT_KIND}List",
                "plural": TENANT_PLURAL,
                "singular": TENANT_KIND.lower(),
                "categories": ["moe"],
            },
            "versions": [version],
        },
    }


def crd_files() -> dict[str, str]:
    """Return the YAML of every CustomResourceDefinition by file name."""
    return {
        CRD_FILE_NAME: render_crd_yaml(),
        TENANT_CRD_FILE_NAME: render_crd_yaml(build_tenant_crd()),
    }
