"""What the gateways and the routers are told of Tenants, and what is wrong with each. Pure.

A Tenant is served as far as it can be: what is wrong with it never keeps another Tenant, or a
model, from being served. Names, host names and keys belong to the oldest Tenant that has them, but
a key of two Tenants is nobody's, as nobody can say whose it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from faasmoe_contracts.control_messages import MAX_TENANTS
from faasmoe_contracts.gateway_file import MAX_MODELS as MAX_FILE_MODELS
from faasmoe_contracts.gateway_file import (
    MAX_TENANT_ENTRIES,
    GatewayFile,
    ModelEntry,
    TenantEntry,
)
from faasmoe_contracts.tls import models_name
from faasmoe_operator.api.v1alpha1.tenant import MAX_MODELS, Tenant, TenantModelSpec
from faasmoe_operator.api.v1alpha1.tenants import TenantSpec
from faasmoe_operator.control.tenant_entries import tenant_entry
from faasmoe_operator.kube.conditions import (
    ConditionState,
    condition_false,
    condition_true,
    condition_unknown,
)
from faasmoe_operator.kube.tenants.observed import ObservedModel, ObservedTenant
from faasmoe_operator.kube.tenants.secret_keys import SecretRef, SecretState
from faasmoe_operator.kube.types import ModelKey

ACCEPTED = condition_true("Accepted", "the gateways know the tenant")
GATEWAY_DISABLED = condition_false(
    "GatewayDisabled", "no gateway runs: install the chart with gateway.enabled=true"
)


@dataclass(frozen=True, slots=True)
class TenantOutcome:
    """What becomes of one Tenant.

    Attributes:
        accepted: whether the gateways know it.
        keys: whether it has keys that are accepted.
        models: whether it may use all models that it names.
        n_keys: keys that are accepted.
        model_names: MoEModels that it may use.
    """

    accepted: ConditionState
    keys: ConditionState
    models: ConditionState
    n_keys: int = 0
    model_names: tuple[str, ...] = ()

    @classmethod
    def refused(cls, state: ConditionState) -> TenantOutcome:
        """Return the outcome of a Tenant that the gateways do not know."""
        waiting = condition_unknown("NotAccepted", "the tenant is not accepted")
        return cls(state, waiting, waiting)


@dataclass(frozen=True, slots=True)
class TenantPlan:
    """What follows from all Tenants.

    Attributes:
        file: what the gateways are told.
        outcomes: what becomes of each Tenant.
        router_tenants: what the routers of each model are told, in addition to their spec.tenants.
    """

    file: GatewayFile
    outcomes: Mapping[ModelKey, TenantOutcome]
    router_tenants: Mapping[ModelKey, tuple[TenantSpec, ...]] = field(default_factory=dict)


@dataclass(slots=True)
class _Candidate:
    """A Tenant that is accepted so far, with what it may use.

    Attributes:
        key: its namespace and name.
        tenant: the Tenant.
        accepted: the state of Accepted.
        models: the models that it may use.
        waiting: the models that it may use once their stores are prepared. Their routers know it
            from their start, as one without tenants would answer everybody.
        models_state: the state of ModelsReady.
    """

    key: ModelKey
    tenant: Tenant
    accepted: ConditionState
    models: dict[ModelKey, TenantModelSpec] = field(default_factory=dict)
    waiting: dict[ModelKey, TenantModelSpec] = field(default_factory=dict)
    models_state: ConditionState = ACCEPTED


def plan_tenants(
    tenants: Sequence[ObservedTenant],
    models: Sequence[ObservedModel],
    secrets: Mapping[SecretRef, SecretState],
    *,
    front_token: Callable[[str], str],
    has_tls: bool = False,
    time_s: float,
) -> TenantPlan:
    """Return the plan.

    Args:
        tenants: all Tenants, older ones first.
        models: all models.
        secrets: what is known of the Secrets that Tenants name.
        front_token: returns what the gateways show the routers of the model with a uid.
        has_tls: whether routers have certificates.
        time_s: current time in seconds since the epoch.
    """
    outcomes: dict[ModelKey, TenantOutcome] = {}
    candidates = _accept(tenants, outcomes)
    by_namespace: dict[str, list[ObservedModel]] = {}
    for model in models:
        by_namespace.setdefault(model.key.namespace, []).append(model)
    n_tenants = Counter({model.key: len(model.own_tenants) for model in models})
    used: set[ModelKey] = set()
    for candidate in candidates:
        _choose_models(candidate, by_namespace.get(candidate.key.namespace, ()), n_tenants, used)
    shared = _shared_digests(candidates, secrets)
    entries = []
    for candidate in candidates:
        secret = secrets.get(secret_ref(candidate))
        digests, keys = _keys(candidate.tenant, secret, shared, time_s)
        outcomes[candidate.key] = TenantOutcome(
            candidate.accepted,
            keys,
            candidate.models_state,
            len(digests),
            tuple(sorted(key.name for key in candidate.models)),
        )
        entries.append(_entry(candidate, digests))
    file = GatewayFile(
        tuple(
            _model_entry(model, front_token, has_tls=has_tls)
            for model in models
            if model.key in used and model.max_model_len is not None
        ),
        tuple(sorted(entries, key=lambda entry: entry.name)),
        is_closed=True,
    )
    return TenantPlan(file, outcomes, _router_tenants(candidates))


def secret_ref(candidate: _Candidate | ObservedTenant) -> SecretRef:
    """Return the Secret of a valid Tenant."""
    assert candidate.tenant is not None
    reference = candidate.tenant.spec.api_keys_secret_ref
    assert reference is not None
    return candidate.key.namespace, reference.name


def _accept(
    tenants: Sequence[ObservedTenant], outcomes: dict[ModelKey, TenantOutcome]
) -> list[_Candidate]:
    """Return the Tenants whose name is theirs, without host names that are not."""
    accepted: dict[str, _Candidate] = {}
    hosts: set[str] = set()
    for observed in tenants:
        tenant, name = observed.tenant, observed.key.name
        if tenant is None:
            problems = "; ".join(observed.problems)
            outcomes[observed.key] = TenantOutcome.refused(condition_false("SpecInvalid", problems))
            continue
        if name in accepted:
            what = (
                f"an older Tenant of another namespace is called {name}, and names are in URLs; "
                "create it with another name"
            )
            outcomes[observed.key] = TenantOutcome.refused(condition_false("NameTaken", what))
            continue
        if len(accepted) >= MAX_TENANT_ENTRIES:
            what = f"the gateways have {MAX_TENANT_ENTRIES} older Tenants already"
            outcomes[observed.key] = TenantOutcome.refused(condition_false("TooManyTenants", what))
            continue
        state, host = ACCEPTED, tenant.spec.host
        if host is not None and host in hosts:
            state = condition_false(
                "HostTaken", f"spec.host: {host} is an older Tenant's; requests need the key alone"
            )
            spec = tenant.spec.model_copy(update={"host": None})
            tenant = tenant.model_copy(update={"spec": spec})
        elif host is not None:
            hosts.add(host)
        accepted[name] = _Candidate(observed.key, tenant, state)
    return list(accepted.values())


def _choose_models(
    candidate: _Candidate,
    models: Sequence[ObservedModel],
    n_tenants: Counter[ModelKey],
    used: set[ModelKey],
) -> None:
    """Set the models that a Tenant may use, and say why it may not use others that it names.

    Args:
        candidate: the Tenant.
        models: those of its namespace.
        n_tenants: tenants of each model so far.
        used: models that any Tenant uses so far.
    """
    by_name = {model.key.name: model for model in models}
    problems = [
        ("ModelUnknown", f"there is no MoEModel {model.name} in the namespace")
        for model in candidate.tenant.spec.models
        if model.name not in by_name
    ]
    names: dict[str, str] = {}
    labels = {name: model.labels for name, model in by_name.items()}
    for name, terms in candidate.tenant.models_among(labels).items():
        model = by_name[name]
        if candidate.key.name in model.own_tenants:
            problems.append(("NameTaken", f"{name} has a tenant of that name in spec.tenants"))
        elif n_tenants[model.key] >= MAX_TENANTS:
            problems.append(("TooManyTenants", f"{name} has {MAX_TENANTS} tenants already"))
        elif model.served_name in names:
            other = names[model.served_name]
            problems.append(("NameAmbiguous", f"{name} has the name of {other} in requests"))
        elif len(candidate.models) + len(candidate.waiting) >= MAX_MODELS:
            problems.append(
                ("TooManyModels", f"{name}: the Tenant has {MAX_MODELS} models already")
            )
        elif len(used | {model.key}) > MAX_FILE_MODELS:
            what = f"{name}: all Tenants together use {MAX_FILE_MODELS} other models already"
            problems.append(("TooManyModels", what))
        else:
            names[model.served_name] = name
            n_tenants[model.key] += 1
            used.add(model.key)
            is_prepared = model.max_model_len is not None
            usable = candidate.models if is_prepared else candidate.waiting
            usable[model.key] = _named(terms, model, names, problems)
    candidate.models_state = _models_state(candidate, problems)


def _named(
    terms: TenantModelSpec,
    model: ObservedModel,
    names: dict[str, str],
    problems: list[tuple[str, str]],
) -> TenantModelSpec:
    """Return a model's terms without an alias that means another model already."""
    alias = terms.alias
    if alias is not None and names.setdefault(alias, model.key.name) != model.key.name:
        what = f"the alias {alias} of {model.key.name} means {names[alias]} already"
        problems.append(("NameAmbiguous", what))
        return terms.model_copy(update={"alias": None})
    return terms


def _models_state(candidate: _Candidate, problems: list[tuple[str, str]]) -> ConditionState:
    if problems:
        return condition_false(problems[0][0], "; ".join(what for _, what in problems))
    if candidate.waiting:
        names = ", ".join(key.name for key in candidate.waiting)
        return condition_unknown("ModelNotPrepared", f"no store yet: {names}")
    if not candidate.models:
        return condition_false("NoModel", "spec.modelSelector selects no MoEModel")
    return condition_true("ModelsFound", f"{len(candidate.models)} models")


def _shared_digests(
    candidates: Sequence[_Candidate], secrets: Mapping[SecretRef, SecretState]
) -> frozenset[str]:
    """Return the digests of keys that several Tenants have."""
    owners: Counter[str] = Counter()
    for candidate in candidates:
        secret = secrets.get(secret_ref(candidate))
        owners.update(set(() if secret is None else secret.digests.values()))
    return frozenset(digest for digest, count in owners.items() if count > 1)


def _keys(
    tenant: Tenant, secret: SecretState | None, shared: frozenset[str], time_s: float
) -> tuple[dict[str, str], ConditionState]:
    """Return the digests of the keys that are accepted, by name, and the state of KeysReady."""
    reference = tenant.spec.api_keys_secret_ref
    assert reference is not None
    if secret is None:
        return {}, condition_unknown("ReadingSecret", f"reading the Secret {reference.name}")
    if secret.is_missing:
        what = f"there is no Secret {reference.name} in the namespace; create it with a key"
        return {}, condition_false("SecretMissing", what)
    expiry = {key.name: key.expires_at for key in tenant.spec.keys if key.expires_at is not None}
    own = {name: digest for name, digest in secret.digests.items() if digest not in shared}
    valid = {n: d for n, d in own.items() if n not in expiry or time_s < expiry[n].timestamp()}
    where = f"Secret {reference.name}"
    if len(own) < len(secret.digests):
        names = ", ".join(sorted(secret.digests.keys() - own.keys()))
        what = f"{where}: another Tenant has the same keys, which nobody can use: {names}"
        return valid, condition_false("KeyInTwoTenants", what)
    if secret.problems:
        return valid, condition_false("KeyInvalid", f"{where}: {'; '.join(secret.problems)}")
    if not own:
        return {}, condition_false("SecretEmpty", f"{where} has no entry; each entry is a key")
    if not valid:
        return {}, condition_false("KeysExpired", f"{where}: all keys have expired; add one")
    expired = len(own) - len(valid)
    return valid, condition_true("KeysFound", f"{len(valid)} keys, {expired} expired")


def _entry(candidate: _Candidate, digests: Mapping[str, str]) -> TenantEntry:
    terms = [
        model.model_copy(update={"name": str(key)})
        for key, model in sorted(candidate.models.items())
    ]
    entry = tenant_entry(candidate.tenant, terms, key_digests=digests)
    return replace(entry, key_expiry={n: s for n, s in entry.key_expiry.items() if n in digests})


def _model_entry(
    model: ObservedModel, front_token: Callable[[str], str], *, has_tls: bool
) -> ModelEntry:
    assert model.max_model_len is not None
    return ModelEntry(
        model.name,
        model.served_name,
        model.max_model_len,
        model.routers,
        front_token(model.uid),
        models_name(model.key.namespace) if has_tls else None,
    )


def _router_tenants(candidates: Sequence[_Candidate]) -> dict[ModelKey, tuple[TenantSpec, ...]]:
    among: dict[ModelKey, list[tuple[_Candidate, TenantModelSpec]]] = {}
    for candidate in candidates:
        for key, terms in (candidate.models | candidate.waiting).items():
            among.setdefault(key, []).append((candidate, terms))
    return {
        key: tuple(
            candidate.tenant.for_model(terms, tenants=[c.key.name for c, _ in found])
            for candidate, terms in sorted(found, key=lambda entry: entry[0].key.name)
        )
        for key, found in among.items()
    }
