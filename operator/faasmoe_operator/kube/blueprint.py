"""What a model's control core is started from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from faasmoe_operator.control.model import ControlledModel
from faasmoe_operator.errors import PlanError
from faasmoe_operator.kube.manifests import ModelContext
from faasmoe_operator.kube.manifests.volumes import store_path
from faasmoe_operator.kube.sandbox_pods import SandboxPods


@dataclass(frozen=True, slots=True)
class Blueprint:
    """What a core is started from: another one means another life.

    Attributes:
        uid: the MoEModel's.
        model: its functions, template and pool.
        token: of its sandboxes and its routers.
        ctx: the model as it was when this was drawn; of no account in comparisons, as what matters
            of it is in the rest.
    """

    uid: str
    model: ControlledModel
    token: str = field(repr=False)
    ctx: ModelContext = field(repr=False, compare=False)

    @classmethod
    def of(cls, ctx: ModelContext) -> Blueprint:
        """Return a model's blueprint; raises PlanError if it cannot be cut as asked."""
        if ctx.summary is None:
            raise PlanError("store: got none yet, expected a store that is prepared")
        model = ControlledModel.in_pods(
            ctx.model,
            ctx.summary,
            store_path=Path(store_path(ctx)),
            key=bytes.fromhex(ctx.secrets.function_key),
            template=SandboxPods.of(ctx),
        )
        return cls(ctx.uid, model, ctx.secrets.token, ctx)
