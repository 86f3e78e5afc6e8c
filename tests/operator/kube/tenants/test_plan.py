"""What gateways and routers are told of Tenants; one that is wrong keeps nobody else out."""

from __future__ import annotations

from typing import Any

import pytest

from faasmoe_contracts.api_keys import key_digest
from faasmoe_contracts.gateway_file import (
    MAX_MODELS,
    MAX_TENANT_ENTRIES,
    GatewayFile,
    RouterEntry,
)
from faasmoe_operator.api.v1alpha1.tenant import Tenant
from faasmoe_operator.kube.tenants.observed import ObservedModel, ObservedTenant
from faasmoe_operator.kube.tenants.plan import TenantOutcome, TenantPlan, plan_tenants
from faasmoe_operator.kube.tenants.secret_keys import SecretRef, SecretState
from faasmoe_operator.kube.types import ModelKey

NOON = 1_795_608_000.0  # 2026-11-25T12:00:00Z
CHAT = ModelKey("llm", "chat")


def model(name: str = "chat", **fields: Any) -> ObservedModel:
    key = ModelKey("llm", name)
    routers = (RouterEntry(f"{name}-router-x", "10.0.0.1:8000"),)
    defaults = {"labels": {}, "served_name": name, "max_model_len": 100, "routers": routers}
    return ObservedModel(key, f"uid-{name}", **{**defaults, **fields})


def tenant(name: str, *, namespace: str = "llm", age: int = 0, **spec: Any) -> ObservedTenant:
    if "models" not in spec and "modelSelector" not in spec:
        spec["models"] = [{"name": "chat"}]
    metadata = {"name": name, "namespace": namespace, "uid": f"uid-{namespace}-{name}"}
    metadata["creationTimestamp"] = f"2026-09-01T12:00:{59 - age:02}Z"
    obj = {
        "apiVersion": "faasmoe.dev/v1alpha1",
        "kind": "Tenant",
        "metadata": metadata,
        "spec": {"apiKeysSecretRef": {"name": f"{name}-keys"}, **spec},
    }
    return ObservedTenant(ModelKey(namespace, name), obj, Tenant.from_object(obj))


def keys(*names: str) -> SecretState:
    return SecretState({name: key_digest(f"sk-{name}").hex() for name in names})


def plan(
    *tenants: ObservedTenant,
    models: tuple[ObservedModel, ...] = (model(),),
    secrets: dict[SecretRef, SecretState] | None = None,
    time_s: float = NOON,
) -> TenantPlan:
    found = {(t.key.namespace, f"{t.key.name}-keys"): keys(t.key.name) for t in tenants}
    result = plan_tenants(
        sorted(tenants, key=lambda t: t.age_order),
        models,
        {**found, **(secrets or {})},
        front_token=lambda uid: f"front-{uid}",
        time_s=time_s,
    )
    assert GatewayFile.loads(result.file.dumps(indent=None)) == result.file
    return result


def state(outcome: TenantOutcome, part: str) -> tuple[str, str]:
    condition = getattr(outcome, part)
    return condition.status, condition.reason


def test_a_tenant_gets_its_models_with_routers_and_digests() -> None:
    acme = tenant(
        "acme",
        models=[{"name": "chat", "alias": "acme-chat"}],
        modelSelector={"matchLabels": {"tier": "open"}},
        limits={"requestsPerMinute": 60, "maxConcurrentRequests": 3},
        weight=2,
    )
    models = (model(), model("code", labels={"tier": "open"}), model("other"))
    planned = plan(acme, models=models)
    (entry,) = planned.file.tenants
    assert [(m.name, m.alias) for m in entry.models] == [
        ("llm/chat", "acme-chat"),
        ("llm/code", None),
    ]
    assert entry.key_digests == {"acme": key_digest("sk-acme").hex()}
    assert entry.limits.requests == 60
    assert [m.name for m in planned.file.models] == ["llm/chat", "llm/code"]
    assert planned.file.models[0].front_token == "front-uid-chat"
    assert planned.file.models[0].routers[0].address == "10.0.0.1:8000"
    assert planned.file.is_closed
    outcome = planned.outcomes[acme.key]
    assert [state(outcome, part)[0] for part in ("accepted", "keys", "models")] == ["True"] * 3
    assert (outcome.n_keys, outcome.model_names) == (1, ("chat", "code"))
    (told,) = planned.router_tenants[CHAT]
    assert (told.name, told.weight, told.limits.max_concurrent_requests) == ("acme", 2, 3)
    assert told.limits.requests_per_minute is None  # the gateways' alone
    assert "sk-acme" not in planned.file.dumps().decode()


def test_names_and_hosts_belong_to_the_oldest() -> None:
    old = tenant("acme", age=9, host="a.example.com")
    young = tenant("acme", namespace="other", age=1)
    same_host = tenant("beta", age=5, host="a.example.com")
    planned = plan(young, same_host, old)
    assert state(planned.outcomes[old.key], "accepted") == ("True", "Accepted")
    assert state(planned.outcomes[young.key], "accepted") == ("False", "NameTaken")
    assert state(planned.outcomes[same_host.key], "accepted") == ("False", "HostTaken")
    assert {t.name: t.host for t in planned.file.tenants} == {"acme": "a.example.com", "beta": None}
    assert planned.file.tenants[1].key_digests  # it is served by its keys


def test_a_key_of_two_tenants_is_nobodys() -> None:
    acme, beta = tenant("acme"), tenant("beta")
    shared = {
        ("llm", "acme-keys"): keys("both", "own"),
        ("llm", "beta-keys"): keys("both"),
    }
    planned = plan(acme, beta, secrets=shared)
    assert [sorted(t.key_digests) for t in planned.file.tenants] == [["own"], []]
    for observed in (acme, beta):
        assert state(planned.outcomes[observed.key], "keys") == ("False", "KeyInTwoTenants")
    assert "acme" not in planned.outcomes[beta.key].keys.message


@pytest.mark.parametrize(
    ("secret", "expected"),
    [
        (SecretState(is_missing=True), ("False", "SecretMissing")),
        (SecretState(), ("False", "SecretEmpty")),
        (SecretState(problems=("x: got no key, expected one",)), ("False", "KeyInvalid")),
        (keys("old"), ("False", "KeysExpired")),
        (keys("old", "new"), ("True", "KeysFound")),
    ],
)
def test_state_of_keys(secret: SecretState, expected: tuple[str, str]) -> None:
    acme = tenant("acme", keys=[{"name": "old", "expiresAt": "2026-11-25T11:00:00Z"}])
    other = tenant("beta")
    planned = plan(acme, other, secrets={("llm", "acme-keys"): secret})
    assert state(planned.outcomes[acme.key], "keys") == expected
    assert state(planned.outcomes[other.key], "keys") == ("True", "KeysFound")
    assert planned.outcomes[acme.key].n_keys == (1 if expected[0] == "True" else 0)


def test_a_key_expires_with_time_alone() -> None:
    acme = tenant("acme", keys=[{"name": "acme", "expiresAt": "2026-11-25T12:00:01Z"}])
    assert plan(acme).outcomes[acme.key].n_keys == 1
    assert plan(acme, time_s=NOON + 1).outcomes[acme.key].n_keys == 0


@pytest.mark.parametrize(
    ("spec", "models", "reason"),
    [
        ({"models": [{"name": "chat"}, {"name": "nowhere"}]}, (model(),), "ModelUnknown"),
        ({"models": [{"name": "chat"}]}, (model(own_tenants=frozenset({"acme"})),), "NameTaken"),
        ({"modelSelector": {"matchLabels": {"a": "b"}}}, (model(),), "NoModel"),
        (
            {"models": [{"name": "chat"}, {"name": "code", "alias": "chat"}]},
            (model(), model("code")),
            "NameAmbiguous",
        ),
        (
            {"models": [{"name": "chat"}, {"name": "code"}]},
            (model(), model("code", served_name="chat")),
            "NameAmbiguous",
        ),
        (
            {"models": [{"name": "chat"}]},
            (model(own_tenants=frozenset(f"t{n}" for n in range(64))),),
            "TooManyTenants",
        ),
    ],
)
def test_models_that_cannot_be_used(
    spec: dict[str, Any], models: tuple[ObservedModel, ...], reason: str
) -> None:
    acme = tenant("acme", **spec)
    planned = plan(acme, models=models)
    assert state(planned.outcomes[acme.key], "models") == ("False", reason)
    assert state(planned.outcomes[acme.key], "accepted")[0] == "True"
    (entry,) = planned.file.tenants
    if reason in ("ModelUnknown", "NameAmbiguous"):  # the others are served
        assert entry.models[0].name == "llm/chat"


def test_a_model_without_a_store_is_waited_for() -> None:
    acme = tenant("acme")
    planned = plan(acme, models=(model(max_model_len=None),))
    assert state(planned.outcomes[acme.key], "models") == ("Unknown", "ModelNotPrepared")
    assert planned.file.models == ()
    assert planned.file.tenants[0].models == ()


def test_routers_know_their_tenants_from_their_start() -> None:
    planned = plan(tenant("acme"), models=(model(max_model_len=None),))  # no router can run yet
    assert [told.name for told in planned.router_tenants[CHAT]] == ["acme"]


def test_tenants_beyond_what_gateways_read_keep_no_older_one_out() -> None:
    old = [tenant(f"t{n}", age=9) for n in range(MAX_TENANT_ENTRIES)]
    young = tenant("acme", age=1)
    planned = plan(young, *old)
    assert state(planned.outcomes[young.key], "accepted") == ("False", "TooManyTenants")
    assert {t.name for t in planned.file.tenants} == {t.key.name for t in old}


def test_models_beyond_what_gateways_and_a_status_take_are_left_out() -> None:
    models = tuple(model(f"m{n:04}", labels={"tier": "open"}) for n in range(260))
    acme = tenant("acme", modelSelector={"matchLabels": {"tier": "open"}})
    planned = plan(acme, models=models)
    assert state(planned.outcomes[acme.key], "models") == ("False", "TooManyModels")
    assert len(planned.outcomes[acme.key].model_names) == 256

    models = tuple(model(f"m{n:04}", labels={"tier": f"{n // 250}"}) for n in range(MAX_MODELS + 9))
    tenants = [
        tenant(f"t{tier}", age=9 - tier, modelSelector={"matchLabels": {"tier": str(tier)}})
        for tier in range(5)
    ]
    planned = plan(*tenants, models=models)
    states = [state(planned.outcomes[t.key], "models")[1] for t in tenants]
    assert states == ["ModelsFound"] * 4 + ["TooManyModels"]
    assert len(planned.file.models) == MAX_MODELS


def test_models_of_other_namespaces_are_unknown() -> None:
    acme = tenant("acme", namespace="other")
    planned = plan(acme)
    assert state(planned.outcomes[acme.key], "models") == ("False", "ModelUnknown")
