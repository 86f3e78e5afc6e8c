"""A container's environment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from faasmoe_operator.kube.kinds import Object
from faasmoe_operator.kube.manifests.context import ModelContext

PREFIX = "FAASMOE_"

OFFLINE = {
    # The pod may not leave the cluster; libraries that try would only wait.
    "HF_HUB_OFFLINE": "1",
    "HF_HOME": "/tmp/huggingface",
    "HOME": "/tmp",
}
"""For pods that read everything from the store."""


def variables(values: Mapping[str, Any]) -> list[Object]:
    """Return variables of these values."""
    return [{"name": name, "value": str(value)} for name, value in values.items()]


def settings(values: Mapping[str, Any]) -> list[Object]:
    """Return FAASMOE_ variables of the values that are given."""
    return variables({f"{PREFIX}{k}": v for k, v in values.items() if v is not None})


def core_count(variable: str, container: str) -> Object:
    """Return a variable with the cores that a container may use, as libraries cannot see it."""
    reference = {"containerName": container, "resource": "limits.cpu", "divisor": "1"}
    return {"name": variable, "valueFrom": {"resourceFieldRef": reference}}


def router_additions(ctx: ModelContext) -> list[Object]:
    """Return what the MoEModel adds to the environment of routers and of the store's Job."""
    router = ctx.spec.router
    return [variable.to_object() for variable in (*router.env, *router.template.env)]


def merged(*parts: Iterable[Object]) -> list[Object]:
    """Return all variables, a later one in place of an earlier one of its name."""
    by_name = {variable["name"]: variable for part in parts for variable in part}
    return list(by_name.values())
