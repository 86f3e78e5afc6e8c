"""The pods that a model's sandboxes are made as: the template of the Kubernetes platform."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from faasmoe_operator.kube.manifests import ModelContext, sandbox_pod, sandbox_template_hash
from faasmoe_operator.kube.manifests.names import sandbox_name
from faasmoe_operator.kube.types import Object

NAME_SUFFIX_ALPHABET = (
    "bcdfghjklmnpqrstvwxz2456789"  # Kubernetes' own, of which no words can be made
)
NAME_SUFFIX_CHARS = 5


@dataclass(frozen=True, slots=True)
class SandboxPodTemplate:
    """The template of a model's sandboxes.

    Attributes:
        ctx: the model; of no account in comparisons, as the hash covers all that pods have of it.
        digest: the template's hash.
    """

    ctx: ModelContext = field(repr=False, compare=False)
    digest: str

    @classmethod
    def from_context(cls, ctx: ModelContext) -> SandboxPodTemplate:
        """Return a model's template; raises PlanError."""
        return cls(ctx, sandbox_template_hash(ctx))

    @property
    def capacity(self) -> int:
        """Functions that one sandbox can hold."""
        return self.ctx.spec.experts.functions_per_sandbox

    def new_pod(self) -> Object:
        """Return a new sandbox's pod."""
        suffix = (secrets.choice(NAME_SUFFIX_ALPHABET) for _ in range(NAME_SUFFIX_CHARS))
        return sandbox_pod(self.ctx, name=sandbox_name(self.ctx.name, "".join(suffix)))
