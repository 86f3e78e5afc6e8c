"""The model that a control core looks after: everything that stays as it is while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_operator.api.v1alpha1 import MoEModel
from faasmoe_operator.api.v1alpha1.experts import ExpertsSpec
from faasmoe_operator.control.functions import ManagedFunction, managed_functions, partitioning_of
from faasmoe_operator.control.local_model import LocalModel
from faasmoe_operator.control.sandbox_client import ModelStore
from faasmoe_operator.plan.functions import LayerShape, plan_functions
from faasmoe_operator.platforms.base import SandboxTemplate


class StoreSummary(Protocol):
    """What a store holds, as far as functions are planned from it; a store's summary is such."""

    @property
    def digest(self) -> str:
        """Digest of its manifest."""
        ...

    def expanded_layers(self) -> Sequence[LayerShape]:
        """Return every MoE layer, ascending by index."""
        ...


@dataclass(frozen=True, slots=True)
class ControlledModel:
    """One model.

    Attributes:
        name: its name in the API.
        store: what functions are attached from.
        functions: every function by id, in the order of the plan.
        template: what new sandboxes are like.
        warm_pool: generic sandboxes that are kept ready.
        memory_limit_bytes: what all functions may take together; None for no limit.
    """

    name: str
    store: ModelStore
    functions: dict[str, ManagedFunction]
    template: SandboxTemplate
    warm_pool: int
    memory_limit_bytes: int | None = None

    @classmethod
    def from_local_model(cls, local_model: LocalModel, *, key: bytes) -> ControlledModel:
        """Return a deployment's model; raises MoEModelError or StoreError.

        Args:
            deployment: a MoEModel whose store is prepared.
            key: secret that makes the function ids opaque.
        """
        manifest = local_model.open_store().manifest
        specs = local_model.functions(manifest, key=key)
        return cls(
            local_model.model.metadata.name,
            ModelStore(local_model.store_path, manifest.digest),
            _managed_functions_by_id(specs, manifest.layers, local_model.model.spec.experts),
            local_model.template,
            local_model.model.spec.experts.warm_pool,
            local_model.model.spec.experts.memory_bytes,
        )

    @classmethod
    def from_store_summary(
        cls,
        model: MoEModel,
        summary: StoreSummary,
        *,
        store_path: Path,
        key: bytes,
        template: SandboxTemplate,
    ) -> ControlledModel:
        """Return a model whose store only its pods can see; raises PlanError.

        Args:
            model: what is asked for.
            content: what its prepared store holds.
            store_path: the store's folder, as the sandboxes see it.
            key: secret that makes the function ids opaque.
            template: what sandboxes are made from.
        """
        layers = summary.expanded_layers()
        partitioning = partitioning_of(model.spec.granularity)
        specs = plan_functions(layers, partitioning, model_digest=summary.digest, key=key)
        return cls(
            model.metadata.name,
            ModelStore(store_path, summary.digest),
            _managed_functions_by_id(specs, layers, model.spec.experts),
            template,
            model.spec.experts.warm_pool,
            model.spec.experts.memory_bytes,
        )

    @property
    def specs(self) -> dict[str, FunctionSpec]:
        """The functions' specs by id."""
        return {name: function.spec for name, function in self.functions.items()}


def _managed_functions_by_id(
    specs: Sequence[FunctionSpec], layers: Sequence[LayerShape], experts: ExpertsSpec
) -> dict[str, ManagedFunction]:
    functions = managed_functions(specs, layers, scaling=experts.scaling)
    return {function.id: function for function in functions}
