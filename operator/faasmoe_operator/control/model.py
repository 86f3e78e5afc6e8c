"""The model that a control process looks after: everything that stays as it is while it runs."""

from __future__ import annotations

from dataclasses import dataclass

from faasmoe_expert.table import FunctionSpec
from faasmoe_operator.control.deployment import Deployment
from faasmoe_operator.control.functions import ManagedFunction, managed_functions
from faasmoe_operator.control.sandbox_client import ModelStore
from faasmoe_operator.platforms.base import SandboxTemplate


@dataclass(frozen=True, slots=True)
class ControlledModel:
    """One model.

    Attributes:
        name: its name in the API.
        store: what functions are attached from.
        functions: every function by id, in the order of the plan.
        template: what new sandboxes are like.
        warm_pool: generic sandboxes that are kept ready.
    """

    name: str
    store: ModelStore
    functions: dict[str, ManagedFunction]
    template: SandboxTemplate
    warm_pool: int

    @classmethod
    def of(cls, deployment: Deployment, *, key: bytes) -> ControlledModel:
        """Return a deployment's model; raises MoEModelError or StoreError.

        Args:
            deployment: a MoEModel whose store is prepared.
            key: secret that makes the function ids opaque.
        """
        manifest = deployment.open_store().manifest
        experts = deployment.model.spec.experts
        specs = deployment.functions(manifest, key=key)
        functions = managed_functions(specs, manifest.layers, scaling=experts.scaling)
        return cls(
            deployment.model.metadata.name,
            ModelStore(deployment.store_path, manifest.digest),
            {function.id: function for function in functions},
            deployment.template,
            experts.warm_pool,
        )

    @property
    def specs(self) -> dict[str, FunctionSpec]:
        """The functions' specs by id."""
        return {name: function.spec for name, function in self.functions.items()}
