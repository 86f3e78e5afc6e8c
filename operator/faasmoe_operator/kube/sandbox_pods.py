"""The pods that a model's sandboxes are made as: the template of the Kubernetes platform."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from faasmoe_operator.kube.kinds import Object
from faasmoe_operator.kube.manifests import ModelContext, sandbox_pod, sandbox_template_hash
from faasmoe_operator.kube.manifests.names import sandbox_name

SUFFIX_LETTERS = "bcdfghjklmnpqrstvwxz2456789"  # Kubernetes' own, of which no words can be made
SUFFIX_CHARS = 5


@dataclass(frozen=True, slots=True)
class SandboxPods:
    """The template of a model's sandboxes.

    Attributes:
        ctx: the model; of no account in comparisons, as the hash covers all that pods have of it.
        digest: the template's hash.
    """

    ctx: ModelContext = field(repr=False, compare=False)
    digest: str

    @classmethod
    def of(cls, ctx: ModelContext) -> SandboxPods:
        """Return a model's template; raises PlanError."""
        return cls(ctx, sandbox_template_hash(ctx))

    @property
    def capacity(self) -> int:
        """Functions that one sandbox can hold."""
        return self.ctx.spec.experts.functions_per_sandbox

    def pod(self) -> Object:
        """Return a new sandbox's pod."""
        letters = (secrets.choice(SUFFIX_LETTERS) for _ in range(SUFFIX_CHARS))
        return sandbox_pod(self.ctx, name=sandbox_name(self.ctx.name, "".join(letters)))
