"""The operator's RBAC rules grant exactly what its requests need."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import pytest

from faasmoe_operator.kube.leader_election import LEASE_NAME
from faasmoe_operator.kube.types import (
    EVENT,
    MOEMODEL,
    OPTIONAL_KINDS,
    OWNED_KINDS,
    POD,
    POD_RESIZE,
    SECRET,
    TENANT,
    WATCHED_KINDS,
    Kind,
    Object,
)

READ = frozenset({"get", "list", "watch"})
WRITE = frozenset({"create", "patch", "delete"})
Rights = dict[tuple[str, str], frozenset[str]]


def required_rights() -> Rights:
    """Return the verbs that the operator uses, by group and resource.

    It watches, applies (`create` and `patch`) and deletes the objects that it owns. It creates
    Secrets but never reads them, and patches status and events.
    """
    rights: dict[tuple[str, str], frozenset[str]] = {
        resource_key(MOEMODEL): READ,
        resource_key(TENANT): READ,
        ("faasmoe.dev", "tenants/status"): frozenset({"patch"}),
        ("faasmoe.dev", "moemodels/status"): frozenset({"patch"}),
        ("faasmoe.dev", "moemodels/finalizers"): frozenset({"update"}),
        resource_key(EVENT): frozenset({"create", "patch"}),
        resource_key(SECRET): frozenset({"create"}),
        resource_key(POD_RESIZE): frozenset({"patch"}),
    }
    for kind in {*OWNED_KINDS, POD} - {SECRET}:
        rights[resource_key(kind)] = WRITE | (
            READ if kind in {*WATCHED_KINDS, *OPTIONAL_KINDS} else frozenset()
        )
    return rights


def resource_key(kind: Kind) -> tuple[str, str]:
    return kind.group, kind.plural


def granted_rights(rules: Iterable[Any]) -> Rights:
    """Return the verbs that rules grant, except for rules with resource names."""
    granted: dict[tuple[str, str], set[str]] = defaultdict(set)
    for rule in rules:
        for group in rule["apiGroups"]:
            for name in rule["resources"]:
                if "resourceNames" not in rule:
                    granted[group, name].update(rule["verbs"])
    return {resource: frozenset(verbs) for resource, verbs in granted.items()}


def roles(objects: list[Object], kind: str, namespace: str | None = None) -> list[Object]:
    return [
        obj
        for obj in objects
        if obj["kind"] == kind
        and obj["metadata"].get("namespace") == namespace
        and "rbac.authorization.k8s.io/aggregate-to-admin" not in obj["metadata"]["labels"]
    ]


def operator_pod(objects: list[Object]) -> Any:
    """Return the spec of the operator's pods."""
    (deployment,) = (
        obj
        for obj in objects
        if obj["kind"] == "Deployment"
        and obj["metadata"]["labels"]["app.kubernetes.io/name"] == "faasmoe-operator"
    )
    return deployment["spec"]["template"]["spec"]


def test_cluster_role_grants_required_rights(
    rendered: dict[str, list[Object]],
) -> None:
    (role,) = roles(rendered["default"], "ClusterRole")
    assert granted_rights(role["rules"]) == required_rights()


@pytest.mark.parametrize("namespace", ["llm", "research"])
def test_role_in_each_namespace_grants_required_rights(
    rendered: dict[str, list[Object]], namespace: str
) -> None:
    objects = rendered["namespaced"]
    assert roles(objects, "ClusterRole") == []
    assert not [obj for obj in objects if obj["kind"] == "ClusterRoleBinding"]
    (role,) = roles(objects, "Role", namespace)
    assert granted_rights(role["rules"]) == required_rights()


def test_roles_are_bound_only_to_operator_account(objects: list[Object]) -> None:
    pod = operator_pod(objects)
    account = {
        "kind": "ServiceAccount",
        "name": pod["serviceAccountName"],
        "namespace": "faasmoe-system",
    }
    bindings = [obj for obj in objects if obj["kind"] in ("RoleBinding", "ClusterRoleBinding")]
    bound = {
        (b["roleRef"]["kind"], b["metadata"].get("namespace"), b["roleRef"]["name"])
        for b in bindings
    }
    assert all(binding["subjects"] == [account] for binding in bindings)
    named = {
        (obj["kind"], obj["metadata"].get("namespace"), obj["metadata"]["name"])
        for obj in objects
        if obj["kind"] in ("Role", "ClusterRole")
        and "rbac.authorization.k8s.io/aggregate-to-admin" not in obj["metadata"]["labels"]
    }
    assert bound == named


def test_rules_have_no_wildcards(objects: list[Object]) -> None:
    for obj in objects:
        for rule in obj.get("rules", ()) if obj["kind"] in ("Role", "ClusterRole") else ():
            assert "*" not in [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]


@pytest.mark.parametrize("values", ["default", "namespaced"])
def test_without_gateways_the_root_key_is_the_only_readable_secret(
    rendered: dict[str, list[Object]], values: str
) -> None:
    objects = rendered[values]
    (key,) = (
        variable["value"]
        for obj in objects
        if obj["kind"] == "Deployment"
        for variable in obj["spec"]["template"]["spec"]["containers"][0]["env"]
        if variable["name"] == "FAASMOE_OPERATOR_ROOT_KEY_SECRET"
    )
    rules = [
        (obj["metadata"].get("namespace"), rule)
        for obj in objects
        if obj["kind"] in ("Role", "ClusterRole")
        for rule in obj["rules"]
        if "secrets" in rule["resources"] and set(rule["verbs"]) != {"create"}
    ]
    ((namespace, rule),) = rules
    assert namespace == "faasmoe-system"
    assert (rule["resourceNames"], rule["verbs"]) == ([key], ["get"])


def test_leader_election_may_use_leases(rendered: dict[str, list[Object]]) -> None:
    (role,) = roles(rendered["namespaced"], "Role", "faasmoe-system")
    leases = [rule for rule in role["rules"] if "leases" in rule["resources"]]
    assert [(r.get("resourceNames"), r["verbs"]) for r in leases] == [
        (None, ["create"]),
        ([LEASE_NAME], ["get", "patch"]),
    ]


def test_single_operator_has_no_rights_on_leases(rendered: dict[str, list[Object]]) -> None:
    (role,) = roles(rendered["default"], "Role", "faasmoe-system")
    assert not [rule for rule in role["rules"] if "leases" in rule["resources"]]


def test_default_roles_include_moemodels(
    rendered: dict[str, list[Object]],
) -> None:
    by_label: dict[str, dict[tuple[str, str], set[str]]] = {}
    for to in ("admin", "edit", "view"):
        verbs_by_resource: dict[tuple[str, str], set[str]] = defaultdict(set)
        for obj in rendered["default"]:
            label = f"rbac.authorization.k8s.io/aggregate-to-{to}"
            if obj["metadata"].get("labels", {}).get(label) == "true":
                for resource, verbs in granted_rights(obj["rules"]).items():
                    verbs_by_resource[resource] |= verbs
        by_label[to] = dict(verbs_by_resource)
    models = ("faasmoe.dev", "moemodels")
    assert by_label["view"][models] == READ
    assert by_label["edit"][models] == READ | WRITE | {"update", "deletecollection"}
    assert by_label["admin"] == by_label["edit"]
    assert ("faasmoe.dev", "moemodels/status") in by_label["view"]


def test_admission_policy_is_that_of_the_operators_account(objects: list[Object]) -> None:
    [policy] = [obj for obj in objects if obj["kind"] == "ValidatingAdmissionPolicy"]
    [binding] = [obj for obj in objects if obj["kind"] == "ValidatingAdmissionPolicyBinding"]
    pod = operator_pod(objects)
    account = f"system:serviceaccount:faasmoe-system:{pod['serviceAccountName']}"
    [condition] = policy["spec"]["matchConditions"]
    assert condition["expression"] == f"request.userInfo.username == '{account}'"
    assert binding["spec"]["policyName"] == policy["metadata"]["name"]
    assert binding["spec"]["validationActions"] == ["Deny"]


def test_admission_policy_covers_all_that_the_operator_may_change(objects: list[Object]) -> None:
    [policy] = [obj for obj in objects if obj["kind"] == "ValidatingAdmissionPolicy"]
    rules = policy["spec"]["matchConstraints"]["resourceRules"]
    covered = {(group, name) for r in rules for group in r["apiGroups"] for name in r["resources"]}
    assert {resource_key(kind) for kind in {*OWNED_KINDS, POD}} <= covered
