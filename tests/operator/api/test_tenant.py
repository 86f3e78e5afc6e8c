"""Tenants as documents of their own, beside MoEModels."""

from __future__ import annotations

from pathlib import Path

import pytest

from faasmoe_operator.api.v1alpha1 import MoEModelError
from faasmoe_operator.api.v1alpha1.documents import load_documents
from faasmoe_operator.api.v1alpha1.moemodel import MoEModel
from faasmoe_operator.api.v1alpha1.tenant import Tenant
from faasmoe_operator.api.v1alpha1.tenants import TenantSpec

MODEL = """\
apiVersion: faasmoe.dev/v1alpha1
kind: MoEModel
metadata: {name: chat}
spec: {model: {source: "hf://org/model"}}
"""
TENANT = """\
apiVersion: faasmoe.dev/v1alpha1
kind: Tenant
metadata: {name: acme}
spec:
  apiKeysPath: keys/acme
"""


def load(folder: Path, *documents: str) -> list[MoEModel | Tenant]:
    file = folder / "all.yaml"
    file.write_text("---\n".join(documents))
    return load_documents(file)


def tenant(folder: Path, rest: str) -> Tenant:
    (parsed,) = load(folder, TENANT + rest)
    assert isinstance(parsed, Tenant)
    return parsed


def problem(folder: Path, text: str) -> str:
    with pytest.raises(MoEModelError) as caught:
        load(folder, text)
    return str(caught.value).removeprefix(f"{folder / 'all.yaml'}: ")


def test_file_holds_models_and_tenants(tmp_path: Path) -> None:
    model, acme = load(tmp_path, MODEL, TENANT + "  models: [{name: chat, alias: c}]\n")
    assert isinstance(model, MoEModel)
    assert isinstance(acme, Tenant)
    assert acme.spec.models[0].alias == "c"


def test_error_names_the_document(tmp_path: Path) -> None:
    with pytest.raises(MoEModelError, match=r"all\.yaml document 2: spec\.models: got nothing"):
        load(tmp_path, MODEL, TENANT)


@pytest.mark.parametrize(
    ("rest", "expected"),
    [
        pytest.param(
            "  models: [{name: a}, {name: a}]\n",
            "spec.models.1.name: got 'a', expected each name once",
            id="model-twice",
        ),
        pytest.param(
            "  models: [{name: a}]\n  budgets: [{unit: inputTokens, period: day, limit: -1}]\n",
            "spec.budgets.0.limit: got -1, expected 0 or more",
            id="budget-below-zero",
        ),
        pytest.param(
            "  models: [{name: a}]\n  budgets: [{unit: money, period: day, limit: 1}]\n",
            "spec.budgets.0.unit: got 'money', expected spec.prices beside it",
            id="money-without-prices",
        ),
        pytest.param(
            "  models: [{name: a}]\n  limit: {}\n",
            "spec.limit: unknown field, did you mean limits?",
            id="unknown-field",
        ),
        pytest.param(
            "  models: [{name: a}]\n  keys: [{name: k, expiresAt: soon}]\n",
            "spec.keys.0.expiresAt: got 'soon'",
            id="no-time",
        ),
    ],
)
def test_names_the_invalid_field(tmp_path: Path, rest: str, expected: str) -> None:
    assert problem(tmp_path, TENANT + rest).startswith(expected)


def test_tenant_without_keys_is_refused(tmp_path: Path) -> None:
    text = TENANT.replace("apiKeysPath: keys/acme", "models: [{name: chat}]")
    assert problem(tmp_path, text).startswith("spec.apiKeysSecretRef: got nothing, expected")


def test_kind_must_be_known(tmp_path: Path) -> None:
    text = TENANT.replace("kind: Tenant", "kind: Tennant")
    assert problem(tmp_path, text) == "kind: got 'Tennant', expected MoEModel or Tenant"


def test_keys_expire(tmp_path: Path) -> None:
    rest = "  models: [{name: a}]\n  keys: [{name: old, expiresAt: 2027-01-31T00:00:00Z}]\n"
    expires_at = tenant(tmp_path, rest).spec.keys[0].expires_at
    assert expires_at is not None
    assert expires_at.isoformat() == "2027-01-31T00:00:00+00:00"


def test_selects_models_by_name_and_label(tmp_path: Path) -> None:
    rest = "  models: [{name: a, alias: x}]\n  modelSelector: {matchLabels: {tier: open}}\n"
    labels = {"a": {"tier": "open"}, "b": {"tier": "open"}, "c": {}}
    models = tenant(tmp_path, rest).models_among(labels)
    assert {name: model.alias for name, model in models.items()} == {"a": "x", "b": None}


def test_routers_are_told_what_concerns_their_model(tmp_path: Path) -> None:
    acme = tenant(
        tmp_path,
        "  models: [{name: a, alias: x, systemPrompt: Be kind., maxOutputTokens: 50}]\n"
        "  weight: 3\n  sharePrefixCacheWith: [b, c]\n"
        "  limits: {requestsPerMinute: 5, tokensPerMinute: 9, maxOutputTokens: 80, "
        "maxConcurrentRequests: 2}\n",
    )
    short = acme.for_model(acme.spec.models[0], tenants=["acme", "c"])
    assert (short.model_alias, short.system_prompt, short.weight) == ("x", "Be kind.", 3)
    assert short.limits.to_object() == {"maxConcurrentRequests": 2, "maxOutputTokens": 50}
    assert short.share_prefix_cache_with == ("c",)


def test_short_form_stands_for_a_tenant_of_one_model() -> None:
    short = TenantSpec.model_validate(
        {
            "name": "acme",
            "apiKeysPath": "keys",
            "modelAlias": "x",
            "limits": {"requestsPerMinute": 7, "maxModelLen": 99},
        }
    )
    acme = Tenant.from_short_form(short, model="chat")
    assert [model.to_object() for model in acme.spec.models] == [{"name": "chat", "alias": "x"}]
    assert acme.spec.limits.requests_per_minute == 7
    again = acme.for_model(acme.spec.models[0], tenants=["acme"])
    assert again.limits.max_model_len == 99
