"""Where a model's pods may run: the template's wishes, and one node for a claim of one node."""

from __future__ import annotations

from faasmoe_operator.kube.kinds import Object
from faasmoe_operator.kube.manifests.context import ModelContext
from faasmoe_operator.kube.manifests.names import Component, selector
from faasmoe_operator.spec.pod_template import PodTemplate, TopologySpread

ONE_NODE = "ReadWriteOnce"
HOSTNAME = "kubernetes.io/hostname"
REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"


def scheduling(ctx: ModelContext, template: PodTemplate, component: Component) -> Object:
    """Return the fields of a pod's spec that the scheduler and the node go by."""
    fields: Object = {
        "nodeSelector": dict(template.node_selector or {}),
        "tolerations": [toleration.to_object() for toleration in template.tolerations],
        "affinity": _affinity(ctx, template),
        "topologySpreadConstraints": _spread(ctx, template, component),
        "priorityClassName": template.priority_class_name,
        "runtimeClassName": template.runtime_class_name,
    }
    return {name: value for name, value in fields.items() if value}


def is_of_one_node(ctx: ModelContext) -> bool:
    """Return whether the store's claim can be mounted on one node only."""
    return ctx.spec.store.access_mode == ONE_NODE


def _affinity(ctx: ModelContext, template: PodTemplate) -> Object:
    affinity: Object = {} if template.affinity is None else template.affinity.to_object()
    if not is_of_one_node(ctx):
        return affinity
    # Elsewhere a pod would be bound and then wait for the volume without end.
    together = {"labelSelector": {"matchLabels": selector(ctx.name)}, "topologyKey": HOSTNAME}
    to_pods = affinity.get("podAffinity", {})
    terms = to_pods.get(REQUIRED, [])
    if isinstance(terms, list):  # else the API server says what is wrong with it
        affinity["podAffinity"] = {**to_pods, REQUIRED: [*terms, together]}
    return affinity


def _spread(ctx: ModelContext, template: PodTemplate, component: Component) -> list[Object]:
    given = template.topology_spread_constraints
    if not given and component is Component.ROUTER and not is_of_one_node(ctx):
        given = (TopologySpread.model_validate({"topologyKey": HOSTNAME}),)
    apart = {"matchLabels": selector(ctx.name, component)}
    return [{**constraint.to_object(), "labelSelector": apart} for constraint in given]
