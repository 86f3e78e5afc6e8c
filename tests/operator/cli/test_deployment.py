"""Models and tenants of several files, checked together."""

from __future__ import annotations

from pathlib import Path

import pytest

from faasmoe_operator.api.v1alpha1 import MoEModelError
from faasmoe_operator.cli.deployment import Deployment
from faasmoe_operator.errors import CommandError

HEAD = "apiVersion: faasmoe.dev/v1alpha1\n"


def write_model(folder: Path, name: str, *, spec: str = "", labels: str = "{}") -> Path:
    file = folder / f"{name}.yaml"
    file.write_text(
        f"{HEAD}kind: MoEModel\nmetadata: {{name: {name}, labels: {labels}}}\n"
        f'spec:\n  model: {{source: "hf://org/model"}}\n{spec}'
    )
    return file


def write_tenant(folder: Path, name: str, spec: str, *, keys: tuple[str, ...] = ("k",)) -> Path:
    keys_folder = folder / "keys" / name
    keys_folder.mkdir(parents=True)
    for key in keys:
        (keys_folder / key).write_text(f"{name}-{key}")
    file = folder / f"tenant-{name}.yaml"
    file.write_text(
        f"{HEAD}kind: Tenant\nmetadata: {{name: {name}}}\nspec:\n  apiKeysPath: keys/{name}\n{spec}"
    )
    return file


def problem(*paths: Path) -> str:
    with pytest.raises(MoEModelError) as caught:
        Deployment.load(paths)
    return str(caught.value)


def test_folder_holds_models_and_tenants(tmp_path: Path) -> None:
    write_model(tmp_path, "a")
    write_model(tmp_path, "b", labels="{tier: open}")
    write_tenant(
        tmp_path,
        "acme",
        "  models: [{name: a, alias: mine, maxOutputTokens: 7}]\n"
        "  modelSelector: {matchLabels: {tier: open}}\n"
        "  keys: [{name: k, expiresAt: 2027-01-01T00:00:00Z}]\n"
        "  limits: {requestsPerMinute: 3, maxOutputTokens: 9}\n"
        "  budgets: [{unit: money, period: month, limit: 5}]\n"
        "  prices: {inputPerMillionTokens: 1, outputPerMillionTokens: 2}\n",
    )
    deployment = Deployment.load([tmp_path])
    assert list(deployment.models) == ["a", "b"]
    assert deployment.warnings() == []
    assert deployment.state_path == tmp_path / ".faasmoe" / "gateway.state"
    file = deployment.gateway_file(
        {name: [tmp_path / name] for name in "ab"}, dict.fromkeys("ab", 64)
    )
    (tenant,) = file.tenants
    assert [(m.name, m.alias, m.max_output_tokens) for m in tenant.models] == [
        ("a", "mine", 7),
        ("b", None, 9),
    ]
    assert tenant.key_expiry == {"k": 1798761600.0}
    assert tenant.limits.requests == 3
    assert type(file).loads(file.dumps()) == file


def test_short_forms_of_models_become_tenants(tmp_path: Path) -> None:
    spec = "  tenants: [{name: acme, apiKeysPath: keys/acme, limits: {requestsPerMinute: 3}}]\n"
    deployment = Deployment.load([write_model(tmp_path, "a", spec=spec)])
    assert deployment.models["a"].model.spec.tenants == ()
    ((short_form, keys),) = deployment.tenants_of("a")
    assert keys == tmp_path / "keys" / "acme"
    assert short_form.limits.requests_per_minute is None  # the gateway's
    assert [w.partition(":")[0] for w in deployment.warnings()] == ["tenant acme"]


def test_model_named_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    files = write_model(tmp_path, "a"), write_model(tmp_path / "other", "a")
    assert "metadata.name: got 'a', which" in problem(*files)


def test_served_name_of_two_models_is_refused(tmp_path: Path) -> None:
    spec = "  router: {servedModelName: org/m}\n"
    files = [write_model(tmp_path, name, spec=spec) for name in "ab"]
    assert "spec.router.servedModelName: got 'org/m', expected another name" in problem(*files)


def test_alias_that_is_another_model_is_refused(tmp_path: Path) -> None:
    files = [write_model(tmp_path, name) for name in "ab"]
    files.append(write_tenant(tmp_path, "acme", "  models: [{name: a, alias: b}, {name: b}]\n"))
    assert "got 'b' for b, which is a already" in problem(*files)


def test_store_of_two_models_is_refused(tmp_path: Path) -> None:
    files = [write_model(tmp_path, name, spec="  store: {path: s}\n") for name in "ab"]
    assert "spec.store.path: got" in problem(*files)


def test_tenant_named_twice_is_refused(tmp_path: Path) -> None:
    spec = "  tenants: [{name: acme, apiKeysPath: keys/acme}]\n"
    files = [write_model(tmp_path, name, spec=spec) for name in "ab"]
    assert "b: spec.tenants.0: metadata.name: got 'acme' twice" in problem(*files)


def test_unknown_model_is_named(tmp_path: Path) -> None:
    files = write_model(tmp_path, "a"), write_tenant(tmp_path, "acme", "  models: [{name: x}]\n")
    assert problem(*files).endswith(
        "Tenant acme: spec.models.0.name: got 'x', expected one of the MoEModels a"
    )


def test_model_that_nobody_may_use_is_named(tmp_path: Path) -> None:
    files = [write_model(tmp_path, name) for name in "ab"]
    files.append(write_tenant(tmp_path, "acme", "  models: [{name: a}]\n"))
    assert "(b): spec.tenants: got none" in problem(*files)


def test_key_of_two_tenants_and_missing_keys_are_warnings(tmp_path: Path) -> None:
    files = [write_model(tmp_path, "a")]
    for name, keys in (("acme", ("k",)), ("beta", ("k",)), ("none", ())):
        files.append(write_tenant(tmp_path, name, "  models: [{name: a}]\n", keys=keys))
    (tmp_path / "keys" / "beta" / "copy").write_text("acme-k")
    warnings = Deployment.load(files).warnings()
    assert [warning.partition(":")[0] for warning in warnings] == ["tenant beta", "tenant none"]
    assert "is also one of acme's" in warnings[0]
    assert "acme-k" not in " ".join(warnings)


def test_tenants_without_a_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="got no MoEModel"):
        Deployment.load([write_tenant(tmp_path, "acme", "  models: [{name: a}]\n")])


def test_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="holds no YAML file"):
        Deployment.load([tmp_path])
