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


def test_pods_of_a_claim_of_one_node_keep_together() -> None:
    for spec in (router(make_context()), sandbox(make_context())):
        assert spec["affinity"]["podAffinity"][REQUIRED] == [TOGETHER]


def test_pods_of_a_claim_of_many_nodes_go_anywhere() -> None:
    assert "affinity" not in sandbox(make_context({"store": MANY}))


def test_a_wish_of_the_template_holds_beside_it() -> None:
    term = {"labelSelector": {"matchLabels": {"app": "cache"}}, "topologyKey": "zone"}
    affinity = {"podAffinity": {REQUIRED: [term]}, "podAntiAffinity": {REQUIRED: [term]}}
    ctx = make_context({"experts": {"template": {"affinity": affinity}}})
    assert sandbox(ctx)["affinity"]["podAffinity"][REQUIRED] == [term, TOGETHER]
    assert sandbox(ctx)["affinity"]["podAntiAffinity"] == {REQUIRED: [term]}
    again = sandbox(ctx)["affinity"]["podAffinity"][REQUIRED]
    assert again == [term, TOGETHER], "the spec itself was changed"


def test_an_affinity_that_is_none_is_left_for_the_api_server_to_refuse() -> None:
    affinity = {"podAffinity": {REQUIRED: "nonsense"}}
    ctx = make_context({"experts": {"template": {"affinity": affinity}}})
    assert sandbox(ctx)["affinity"] == affinity


def test_routers_spread_over_nodes_by_themselves() -> None:
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


def test_the_templates_spreading_takes_its_place_and_finds_the_pods() -> None:
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
def test_hands_over_what_the_template_says(template: Object, expected: Object) -> None:
    spec = sandbox(make_context({"experts": {"template": template}}))
    assert spec.items() >= expected.items()
