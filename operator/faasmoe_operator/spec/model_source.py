"""Where the checkpoint comes from, and in which number format it is served."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from faasmoe_operator.spec import patterns
from faasmoe_operator.spec.base import Part, rule_broken
from faasmoe_operator.spec.extensions import KUBERNETES_ONLY, cel, checked, rules
from faasmoe_operator.spec.references import KeyReference

HUB_SCHEME = "hf://"
CLAIM_SCHEME = "pvc://"
FILE_SCHEME = "file://"


@dataclass(frozen=True, slots=True)
class ClaimPath:
    """A folder in a PersistentVolumeClaim.

    Attributes:
        claim: the claim's name.
        path: the folder, relative to the volume's root; empty for the root itself.
    """

    claim: str
    path: str


_FIXED = "expected what it was: make another MoEModel for another"
_IS_HUB = "self.source.startsWith('hf://')"


class ModelSource(Part):
    """Where the checkpoint comes from."""

    model_config = rules(
        cel(
            f"!has(self.revision) || {_IS_HUB}",
            "expected no revision unless source is hf://",
            field=".revision",
        ),
        cel(
            f"!has(self.tokenSecretRef) || {_IS_HUB}",
            "expected no tokenSecretRef unless source is hf://",
            field=".tokenSecretRef",
        ),
        cel(
            "has(self.revision) == has(oldSelf.revision) && "
            "(!has(self.revision) || self.revision == oldSelf.revision)",
            f"{_FIXED} revision",
            field=".revision",
            reason="FieldValueForbidden",
        ),
        cel(
            "self.dtype == oldSelf.dtype",
            f"{_FIXED} dtype",
            field=".dtype",
            reason="FieldValueForbidden",
        ),
    )

    source: Annotated[str, Field(pattern=patterns.SOURCE, max_length=2048)] = Field(
        description="hf://ORG/NAME of a model hub or pvc://CLAIM/PATH of a claim; for `faasmoe up` "
        "hf://ORG/NAME, file:///PATH, or file://PATH relative to the MoEModel file.",
        json_schema_extra=checked(
            cel(
                f"self.matches(r'{patterns.KUBERNETES_SOURCE}') && !self.contains('/..')",
                "expected hf://ORG/NAME or pvc://CLAIM/PATH; file:// is for `faasmoe up` alone",
            ),
            cel("self == oldSelf", f"{_FIXED} source", reason="FieldValueForbidden"),
        ),
    )
    revision: Annotated[str, Field(min_length=1, max_length=200)] | None = Field(
        None, description="Branch, tag or commit of a hub model; the hub's default if left out."
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="Number format to serve in; auto keeps the checkpoint's."
    )
    token_secret_ref: KeyReference | None = Field(
        None,
        description="Token of the hub, for gated and private models.",
        json_schema_extra=KUBERNETES_ONLY,
    )

    @property
    def claim_path(self) -> ClaimPath | None:
        """Where a pvc:// source lies; None for others."""
        if not self.source.startswith(CLAIM_SCHEME):
            return None
        claim, _, path = self.source.removeprefix(CLAIM_SCHEME).partition("/")
        return ClaimPath(claim, path.strip("/"))

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.source.startswith(CLAIM_SCHEME) and "/.." in self.source:
            raise rule_broken("source", got=self.source, expected="a path without ..")
        if self.source.startswith(HUB_SCHEME):
            return self
        for field, value in (
            ("revision", self.revision),
            ("tokenSecretRef", self.token_secret_ref),
        ):
            if value is not None:
                got = value if isinstance(value, str) else value.to_object()
                raise rule_broken(field, got=got, expected="none unless source is hf://")
        return self
