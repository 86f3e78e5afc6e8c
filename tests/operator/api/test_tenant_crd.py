"""The CRD of the Tenant: what the API server validates is what pydantic validates."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from faasmoe_operator.api.v1alpha1.tenant import Tenant
from faasmoe_operator.api.v1alpha1.tenant_crd import build_tenant_crd, crd_files

ROOT = Path(__file__).parents[3]
ApiServer = Any  # conftest's; a test module cannot import it
SECRET = {"name": "acme-keys"}
BUDGET = {"unit": "money", "period": "day", "limit": 5}
PRICES = {"inputPerMillionTokens": 0.2, "outputPerMillionTokens": 0.8}


def tenant(name: str = "acme", **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "faasmoe.dev/v1alpha1",
        "kind": "Tenant",
        "metadata": {"name": name, "namespace": "llm"},
        "spec": {"apiKeysSecretRef": SECRET, "models": [{"name": "chat"}], **spec},
    }


@pytest.mark.parametrize("folder", ["crds", "charts/faasmoe/crds"])
def test_committed_files_are_up_to_date(folder: str) -> None:
    for name, text in crd_files().items():
        assert (ROOT / folder / name).read_text() == text, f"`faasmoe crd --output {folder}`"


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"modelSelector": {"matchLabels": {"tier": "open"}}, "models": []},
        {"budgets": [BUDGET], "prices": PRICES},
        {
            "keys": [{"name": "laptop", "expiresAt": "2027-01-31T00:00:00Z"}],
            "weight": 2,
            "priority": -1,
            "host": "acme.example.com",
            "models": [
                {"name": "chat", "alias": "c", "systemPrompt": "Be kind.", "maxOutputTokens": 9}
            ],
            "limits": {"requestsPerMinute": 6, "inputTokensPerMinute": 7},
        },
    ],
)
def test_valid_tenants_are_accepted(spec: dict[str, Any], tenant_api_server: ApiServer) -> None:
    assert tenant_api_server.problems(tenant(**spec)) == []
    stored = tenant_api_server.defaulted(tenant(**spec))
    assert Tenant.model_validate(stored) == Tenant.model_validate(tenant(**spec))


@pytest.mark.parametrize(
    "document",
    [
        pytest.param(tenant(apiKeysSecretRef=None), id="no-secret"),
        pytest.param(tenant(models=[]), id="no-model"),
        pytest.param(tenant(budgets=[BUDGET]), id="money-without-prices"),
        pytest.param(tenant(budgets=[{**BUDGET, "limit": -1}], prices=PRICES), id="below-zero"),
        pytest.param(tenant(weight=0), id="weight"),
        pytest.param(tenant(host="not a host"), id="host"),
        pytest.param(tenant("Acme"), id="name"),
        pytest.param(tenant(limits={"requestsPerMinute": 0}), id="limit"),
        pytest.param(tenant(prices={**PRICES, "currency": "euro"}), id="currency"),
    ],
)
def test_invalid_tenants_are_refused_by_both(
    document: dict[str, Any], tenant_api_server: ApiServer
) -> None:
    spec = {name: value for name, value in document["spec"].items() if value is not None}
    document = {**document, "spec": spec}
    assert tenant_api_server.problems(document) != []
    with pytest.raises(ValidationError):
        Tenant.model_validate(document)


def test_every_field_has_a_description() -> None:
    def undescribed(schema: dict[str, Any], path: str) -> Iterator[str]:
        for name, field in schema.get("properties", {}).items():
            if not field.get("description") and f"{path}.{name}" != ".metadata":
                yield f"{path}.{name}"
            yield from undescribed(field, f"{path}.{name}")
        for values in (schema.get("items"), schema.get("additionalProperties")):
            if isinstance(values, dict):
                yield from undescribed(values, f"{path}[]")

    (version,) = build_tenant_crd()["spec"]["versions"]
    assert list(undescribed(version["schema"]["openAPIV3Schema"], "")) == []


def test_yaml_round_trips() -> None:
    assert yaml.safe_load(crd_files()["faasmoe.dev_tenants.yaml"]) == build_tenant_crd()
