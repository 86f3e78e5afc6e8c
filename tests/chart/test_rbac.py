"""The operator's rights are those of the requests that it makes: no fewer, and no more."""

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
    SECRET,
    WATCHED_KINDS,
    Kind,
    Object,
)

READ = frozenset({"get", "list", "watch"})
WRITE = frozenset({"create", "patch", "delete"})
Rights = dict[tuple[str, str], frozenset[str]]


def required_rights() -> Rights:
    """Return what the operator asks of the API server, by group and resource.

    It watches what it owns, applies (`create` and `patch`) and deletes it; a Secret is created and
    never read; status and events are patched.
    """
    rights: dict[tuple[str, str], frozenset[str]] = {
        resource_key(MOEMODEL): READ,
        ("faasmoe.dev", "moemodels/status"): frozenset({"patch"}),
        ("faasmoe.dev", "moemodels/finalizers"): frozenset({"update"}),
        resource_key(EVENT): frozenset({"create", "patch"}),
        resource_key(SECRET): frozenset({"create"}),
    }
    for kind in {*OWNED_KINDS, POD} - {SECRET}:
        rights[resource_key(kind)] = WRITE | (
            READ if kind in {*WATCHED_KINDS, *OPTIONAL_KINDS} else frozenset()
        )
    return rights


def resource_key(kind: Kind) -> tuple[str, str]:
    return kind.group, kind.plural


def granted_rights(rules: Iterable[Any]) -> Rights:
    """Return the rights that rules give, those of named objects left out."""
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    for rule in rules:
        for group in rule["apiGroups"]:
            for name in rule["resources"]:
                if "resourceNames" not in rule:
                    found[group, name].update(rule["verbs"])
    return {place: frozenset(verbs) for place, verbs in found.items()}


def roles(objects: list[Object], kind: str, namespace: str | None = None) -> list[Object]:
    return [
        obj
        for obj in objects
        if obj["kind"] == kind
        and obj["metadata"].get("namespace") == namespace
        and "rbac.authorization.k8s.io/aggregate-to-admin" not in obj["metadata"]["labels"]
    ]


def test_for_all_namespaces_one_cluster_role_gives_what_is_needed(
    rendered: dict[str, list[Object]],
) -> None:
    (role,) = roles(rendered["default"], "ClusterRole")
    assert granted_rights(role["rules"]) == required_rights()


@pytest.mark.parametrize("namespace", ["llm", "research"])
def test_for_some_namespaces_a_role_in_each_gives_the_same(
    rendered: dict[str, list[Object]], namespace: str
) -> None:
    objects = rendered["namespaced"]
    assert roles(objects, "ClusterRole") == []
    assert not [obj for obj in objects if obj["kind"] == "ClusterRoleBinding"]
    (role,) = roles(objects, "Role", namespace)
    assert granted_rights(role["rules"]) == required_rights()


def test_every_role_is_bound_to_the_operators_account_alone(objects: list[Object]) -> None:
    (pod,) = (obj["spec"]["template"]["spec"] for obj in objects if obj["kind"] == "Deployment")
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


def test_no_rule_has_a_wildcard(objects: list[Object]) -> None:
    for obj in objects:
        for rule in obj.get("rules", ()) if obj["kind"] in ("Role", "ClusterRole") else ():
            assert "*" not in [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]


def test_only_the_root_key_is_read_of_all_secrets(objects: list[Object]) -> None:
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


def test_several_operators_may_choose_a_leader(rendered: dict[str, list[Object]]) -> None:
    (role,) = roles(rendered["namespaced"], "Role", "faasmoe-system")
    leases = [rule for rule in role["rules"] if "leases" in rule["resources"]]
    assert [(r.get("resourceNames"), r["verbs"]) for r in leases] == [
        (None, ["create"]),
        ([LEASE_NAME], ["get", "patch"]),
    ]


def test_one_operator_has_nothing_to_do_with_leases(rendered: dict[str, list[Object]]) -> None:
    (role,) = roles(rendered["default"], "Role", "faasmoe-system")
    assert not [rule for rule in role["rules"] if "leases" in rule["resources"]]


def test_people_who_may_edit_may_edit_models_and_who_may_view_may_view_them(
    rendered: dict[str, list[Object]],
) -> None:
    by_label: dict[str, dict[tuple[str, str], set[str]]] = {}
    for to in ("admin", "edit", "view"):
        found: dict[tuple[str, str], set[str]] = defaultdict(set)
        for obj in rendered["default"]:
            label = f"rbac.authorization.k8s.io/aggregate-to-{to}"
            if obj["metadata"].get("labels", {}).get(label) == "true":
                for place, verbs in granted_rights(obj["rules"]).items():
                    found[place] |= verbs
        by_label[to] = dict(found)
    models = ("faasmoe.dev", "moemodels")
    assert by_label["view"][models] == READ
    assert by_label["edit"][models] == READ | WRITE | {"update", "deletecollection"}
    assert by_label["admin"] == by_label["edit"]
    assert ("faasmoe.dev", "moemodels/status") in by_label["view"]
