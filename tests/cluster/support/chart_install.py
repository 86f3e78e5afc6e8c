"""Installs what the chart brings besides the operator: CRD, namespace, ServiceAccount, RBAC."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from apiserver import ApiRequestError, ApiServer, Object, eventually
from helm import Helm
from operator_process import NAMESPACE

PLURAL_BY_KIND = {
    "CustomResourceDefinition": "customresourcedefinitions",
    "ServiceAccount": "serviceaccounts",
    "ClusterRole": "clusterroles",
    "ClusterRoleBinding": "clusterrolebindings",
    "Role": "roles",
    "RoleBinding": "rolebindings",
    "ValidatingAdmissionPolicy": "validatingadmissionpolicies",
    "ValidatingAdmissionPolicyBinding": "validatingadmissionpolicybindings",
}
CLUSTER_SCOPED = ("Cluster", "CustomResourceDefinition", "ValidatingAdmissionPolicy")
CRDS = ("moemodels.faasmoe.dev", "tenants.faasmoe.dev")


@contextmanager
def installed_chart(api: ApiServer, helm: Helm) -> Iterator[str]:
    """Install the chart without its Deployments; yield the operator's ServiceAccount name.

    Its admission policy is in effect then, which takes the API server some seconds.
    """
    values = {"replicas": 2, "gateway": {"enabled": True}}
    objects = [o for o in helm.template(values) if o["kind"] in PLURAL_BY_KIND]
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}
    api.apply("namespaces", namespace)
    for obj in objects:
        api.apply(PLURAL_BY_KIND[obj["kind"]], _in_namespace(obj))
    for crd in CRDS:
        eventually(partial(api.get, "customresourcedefinitions", "", crd), _is_established)
    (account,) = (o for o in objects if o["kind"] == "ServiceAccount" and "operator" in _name(o))
    token = api.create_token(NAMESPACE, _name(account))
    operator = ApiServer(api.credentials.with_token(token))
    eventually(partial(_is_denied_by_policy, operator), bool)
    operator.close()
    try:
        yield _name(account)
    finally:
        for obj in reversed(objects):
            api.delete(
                PLURAL_BY_KIND[obj["kind"]], obj["metadata"].get("namespace", ""), _name(obj)
            )
        api.delete("namespaces", "", NAMESPACE)


def _is_denied_by_policy(operator: ApiServer) -> bool:
    """Return whether the policy denies the operator an object without its label."""
    meta = {"name": "not-the-operators", "namespace": NAMESPACE}
    try:
        operator.apply(
            "configmaps", {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta}, dry_run=True
        )
    except ApiRequestError as error:
        return "the FaaSMoE operator may change only" in str(error)
    return False


def _name(obj: Object) -> str:
    return str(obj["metadata"]["name"])


def _in_namespace(obj: Object) -> Object:
    if obj["kind"].startswith(CLUSTER_SCOPED):
        return obj
    return {**obj, "metadata": {"namespace": NAMESPACE, **obj["metadata"]}}


def _is_established(crd: Object) -> bool:
    found = crd.get("status", {}).get("conditions", [])
    return any(c["type"] == "Established" and c["status"] == "True" for c in found)
