"""The model that a controller serves: everything that does not change while it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_operator.api.v1alpha1 import MoEModel
from faasmoe_operator.api.v1alpha1.experts import ExpertsSpec
from faasmoe_operator.control.function_contents import FunctionContents
from faasmoe_operator.control.functions import ManagedFunction, managed_functions, partitioning_of
from faasmoe_operator.control.local_model import LocalModel
from faasmoe_operator.control.sandbox_client import ModelStore
from faasmoe_operator.plan.functions import LayerShape, plan_functions
from faasmoe_operator.platforms.base import SandboxTemplate

SANDBOX_PROCESS_BYTES = 16_000_000
"""What a sandbox of `faasmoe up` does not share with its zygote, beside its functions."""
SANDBOX_SHARE_BYTES = 2_000_000
"""Of that, what each model adds to a process that models share; measured 1 MB."""


class PlannableStore(Protocol):
    """What planning functions needs to know about a store; kube's store summary implements it."""

    @property
    def digest(self) -> str:
        """Digest of the store's manifest."""
        ...

    def expanded_layers(self) -> Sequence[LayerShape]:
        """Return every MoE layer, ascending by index."""
        ...


@dataclass(frozen=True, slots=True)
class ControlledModel:
    """A model with its planned functions.

    Attributes:
        name: the MoEModel's name.
        store: the store that functions are attached from.
        functions: every function by id, in the order of the plan.
        template: template of new sandboxes.
        warm_pool: number of empty sandboxes to keep ready.
        memory_limit_bytes: memory limit of all attached functions together; None for no limit.
        rows_per_token: most rows that one token adds to the calls of all functions together.
        sandbox_bytes: memory of a sandbox beside its functions, as a limit over models counts it.
        shares_sandboxes: whether its sandboxes may hold functions of other models, too.
    """

    name: str
    store: ModelStore
    functions: dict[str, ManagedFunction]
    template: SandboxTemplate
    warm_pool: int
    memory_limit_bytes: int | None = None
    rows_per_token: int = 1
    sandbox_bytes: int = 0
    shares_sandboxes: bool = False

    @classmethod
    def from_local_model(
        cls, local_model: LocalModel, *, key: bytes, shares_memory: bool = False
    ) -> ControlledModel:
        """Return the model of a MoEModel file on this machine.

        Args:
            local_model: a MoEModel whose store is prepared.
            key: secret key that makes the function ids opaque.
            shares_memory: whether it shares a memory limit with other models.

        Raises:
            MoEModelError: the model does not match its store or cannot be partitioned.
            StoreError: the store is damaged.
            OSError: a file of the store is gone.
        """
        store = local_model.open_store()
        manifest = store.manifest
        specs = local_model.functions(manifest, key=key)
        functions = _managed_functions_by_id(specs, manifest.layers, local_model.model.spec.experts)
        if shares_memory:
            contents = FunctionContents(store)
            functions = {
                name: replace(function, content=contents.content_of(function.spec))
                for name, function in functions.items()
            }
        return cls(
            local_model.model.metadata.name,
            ModelStore(local_model.store_path, manifest.digest),
            functions,
            local_model.template,
            local_model.model.spec.experts.warm_pool,
            local_model.model.spec.experts.memory_bytes,
            _rows_per_token(specs, manifest.layers),
            SANDBOX_PROCESS_BYTES if shares_memory else 0,
        )

    @classmethod
    def from_store_summary(
        cls,
        model: MoEModel,
        summary: PlannableStore,
        *,
        store_path: Path,
        key: bytes,
        template: SandboxTemplate,
    ) -> ControlledModel:
        """Return a model whose store is mounted only in its pods.

        Args:
            model: the MoEModel.
            summary: what its prepared store holds.
            store_path: the store's folder in the sandboxes.
            key: secret key that makes the function ids opaque.
            template: template of new sandboxes.

        Raises:
            PlanError: the model cannot be partitioned as requested.
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
            _rows_per_token(specs, layers),
        )

    @property
    def specs(self) -> dict[str, FunctionSpec]:
        """The functions' specs by function id."""
        return {name: function.spec for name, function in self.functions.items()}


def _managed_functions_by_id(
    specs: Sequence[FunctionSpec], layers: Sequence[LayerShape], experts: ExpertsSpec
) -> dict[str, ManagedFunction]:
    functions = managed_functions(specs, layers, scaling=experts.scaling)
    return {function.id: function for function in functions}


def _rows_per_token(specs: Sequence[FunctionSpec], layers: Sequence[LayerShape]) -> int:
    """Return how many functions one token calls at most, counted once per layer."""
    n_functions = Counter(layer for spec in specs for layer in spec.layers)
    return sum(min(layer.top_k, n_functions[layer.index]) for layer in layers)
