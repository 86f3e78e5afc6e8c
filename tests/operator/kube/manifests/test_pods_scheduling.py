from typing import Any

import pytest
from model_contexts import make_context

from faasmoe_operator.kube.manifests import sandbox_pod, serving_objects
from faasmoe_operator.kube.manifests.context import ModelContext
from faasmoe_operator.kube.types import Object

REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"
TOGETHER = {
    "labelSelector": {"matchLabels": {"faasmoe.dev/model": "qwen"}},
    "topologyKey": "kubernetes.io/hostname",
}
MANY = {"accessMode": "ReadWriteMany"}


def sandbox(ctx: ModelContext) -> Any:
    return sandbox_pod(ctx, name="qwen-sandbox-abcde")["spec"]


def router(ctx: ModelContext) -> Any:
    (deployment,) = (obj for obj in serving_objects(ctx) if obj["kind"] == "Deployment")
    return deployment["spec"]["template"]["spec"]


def test_a_single_node_claim_colocates_pods() -> None:
    for spec in (router(make_context()), sandbox(make_context())):
        assert spec["affinity"]["podAffinity"][REQUIRED] == [TOGETHER]


def test_a_shared_claim_adds_no_affinity() -> None:
    assert "affinity" not in sandbox(make_context({"store": MANY}))


def test_template_affinity_is_kept_besides_colocation() -> None:
    term = {"labelSelector": {"matchLabels": {"app": "cache"}}, "topologyKey": "zone"}
    affinity = {"podAffinity": {REQUIRED: [term]}, "podAntiAffinity": {REQUIRED: [term]}}
    ctx = make_context({"experts": {"template": {"affinity": affinity}}})
    assert sandbox(ctx)["affinity"]["podAffinity"][REQUIRED] == [term, TOGETHER]
    assert sandbox(ctx)["affinity"]["podAntiAffinity"] == {REQUIRED: [term]}
    again = sandbox(ctx)["affinity"]["podAffinity"][REQUIRED]
    assert again == [term, TOGETHER], "the spec itself was changed"


def test_an_invalid_affinity_is_left_to_the_api_server() -> None:
    affinity = {"podAffinity": {REQUIRED: "nonsense"}}
    ctx = make_context({"experts": {"template": {"affinity": affinity}}})
    assert sandbox(ctx)["affinity"] == affinity


def test_routers_spread_over_nodes_by_default() -> None:
    assert router(make_context({"store": MANY}))["topologySpreadConstraints"] == [
        {
            "topologyKey": "kubernetes.io/hostname",
            "maxSkew": 1,
            "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": {
                "matchLabels": {
                    "faasmoe.dev/model": "qwen",
                    "app.kubernetes.io/component": "router",
                }
            },
        }
    ]
    assert "topologySpreadConstraints" not in router(make_context())


def test_template_topology_spread_replaces_the_default() -> None:
    template = {"topologySpreadConstraints": [{"topologyKey": "zone", "maxSkew": 2}]}
    ctx = make_context({"store": MANY, "router": {"template": template}})
    (constraint,) = router(ctx)["topologySpreadConstraints"]
    assert (constraint["topologyKey"], constraint["maxSkew"]) == ("zone", 2)
    labels = constraint["labelSelector"]["matchLabels"]
    assert labels["app.kubernetes.io/component"] == "router"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ({"nodeSelector": {"pool": "big"}}, {"nodeSelector": {"pool": "big"}}),
        ({"priorityClassName": "high"}, {"priorityClassName": "high"}),
        ({"runtimeClassName": "gvisor"}, {"runtimeClassName": "gvisor"}),
        ({"imagePullSecrets": [{"name": "a"}]}, {"imagePullSecrets": [{"name": "a"}]}),
        (
            {"tolerations": [{"key": "gpu", "operator": "Exists"}]},
            {"tolerations": [{"key": "gpu", "operator": "Exists"}]},
        ),
    ],
)
def test_template_fields_are_passed_on(template: Object, expected: Object) -> None:
    spec = sandbox(make_context({"experts": {"template": template}}))
    assert spec.items() >= expected.items()
