"""Template from which the Kubernetes platform creates the sandbox pods of a model."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from faasmoe_operator.kube.manifests import ModelContext, sandbox_pod, sandbox_template_hash
from faasmoe_operator.kube.manifests.names import sandbox_name
from faasmoe_operator.kube.types import Object

NAME_SUFFIX_ALPHABET = "bcdfghjklmnpqrstvwxz2456789"  # as in Kubernetes: cannot spell words
NAME_SUFFIX_CHARS = 5


@dataclass(frozen=True, slots=True)
class SandboxPodTemplate:
    """Pod template of a model's sandboxes.

    Attributes:
        ctx: the model's context; not compared, as the hash covers what pods contain of it.
        digest: hash of the template.
    """

    ctx: ModelContext = field(repr=False, compare=False)
    digest: str

    @classmethod
    def from_context(cls, ctx: ModelContext) -> SandboxPodTemplate:
        """Return a model's template; raises PlanError."""
        return cls(ctx, sandbox_template_hash(ctx))

    @property
    def capacity(self) -> int:
        """Number of functions that one sandbox can hold."""
        return self.ctx.spec.experts.functions_per_sandbox

    def new_pod(self) -> Object:
        """Return a new sandbox pod with a random name."""
        suffix = (secrets.choice(NAME_SUFFIX_ALPHABET) for _ in range(NAME_SUFFIX_CHARS))
        return sandbox_pod(self.ctx, name=sandbox_name(self.ctx.name, "".join(suffix)))
