"""Storage: the source of the checkpoint, and the store that holds the prepared checkpoint.

The store is a folder for `faasmoe up` and a PersistentVolumeClaim on Kubernetes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from faasmoe_operator.api.v1alpha1 import patterns
from faasmoe_operator.api.v1alpha1.base import (
    KUBERNETES_ONLY,
    PROCESS_ONLY,
    ApiModel,
    SchemaExtension,
    cel_rule,
    model_validations,
    validation_error,
    validations,
)
from faasmoe_operator.api.v1alpha1.field_types import ByteQuantity, KeySelector, ObjectName
from faasmoe_operator.api.v1alpha1.pod_template import ResourceRequirements

HUB_SCHEME = "hf://"
PVC_SCHEME = "pvc://"
FILE_SCHEME = "file://"
OCI_SCHEME = "oci://"


@dataclass(frozen=True, slots=True)
class PVCPath:
    """A folder in a PersistentVolumeClaim.

    Attributes:
        claim: the claim's name.
        path: the folder, relative to the volume's root; empty for the root itself.
    """

    claim: str
    path: str


_SOURCE_IMMUTABLE = "immutable: create another MoEModel for another"
_CEL_IS_HUB = "self.source.startsWith('hf://')"


class ModelSource(ApiModel):
    """The source of the checkpoint."""

    model_config = model_validations(
        cel_rule(
            f"!has(self.revision) || {_CEL_IS_HUB}",
            "expected no revision unless source is hf://",
            field=".revision",
        ),
        cel_rule(
            f"!has(self.tokenSecretRef) || {_CEL_IS_HUB}",
            "expected no tokenSecretRef unless source is hf://",
            field=".tokenSecretRef",
        ),
        cel_rule(
            f"!has(self.caBundleRef) || {_CEL_IS_HUB}",
            "expected no caBundleRef unless source is hf://",
            field=".caBundleRef",
        ),
        cel_rule(
            "has(self.revision) == has(oldSelf.revision) && "
            "(!has(self.revision) || self.revision == oldSelf.revision)",
            f"{_SOURCE_IMMUTABLE} revision",
            field=".revision",
            reason="FieldValueForbidden",
        ),
        cel_rule(
            "self.dtype == oldSelf.dtype",
            f"{_SOURCE_IMMUTABLE} dtype",
            field=".dtype",
            reason="FieldValueForbidden",
        ),
    )

    source: Annotated[str, Field(pattern=patterns.SOURCE, max_length=2048)] = Field(
        description="hf://ORG/NAME of a model hub, hf://ORG/NAME:QUANT or hf://ORG/NAME:FILE of "
        "its GGUF files, s3://BUCKET/PATH, gs://BUCKET/PATH, https://HOST/PATH, pvc://CLAIM/PATH "
        "of a PersistentVolumeClaim, or oci://IMAGE, an OCI artifact with the checkpoint's files; "
        "for `faasmoe up` all but pvc:// and oci://, and file:///PATH, or file://PATH relative to "
        "the MoEModel file.",
        json_schema_extra=validations(
            cel_rule(
                f"self.matches(r'{patterns.KUBERNETES_SOURCE}') && !self.contains('/..')",
                "expected hf://ORG/NAME, pvc://CLAIM/PATH, oci://IMAGE, s3://BUCKET/PATH, "
                "gs://BUCKET/PATH or https://HOST/PATH; file:// is for `faasmoe up` only",
            ),
            cel_rule(
                "self == oldSelf", f"{_SOURCE_IMMUTABLE} source", reason="FieldValueForbidden"
            ),
        ),
    )
    revision: Annotated[str, Field(min_length=1, max_length=200)] | None = Field(
        None, description="Branch, tag or commit of a hub model; the hub's default if omitted."
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="Data type of the weights; auto keeps the checkpoint's."
    )
    token_secret_ref: KeySelector | None = Field(
        None,
        description="Token of the hub, for gated and private models.",
        json_schema_extra=KUBERNETES_ONLY,
    )
    ca_bundle_ref: KeySelector | None = Field(
        None,
        description="Key of a ConfigMap with the certificates, in PEM, that the hub or its mirror "
        "is verified by, instead of those of the image.",
        json_schema_extra=KUBERNETES_ONLY,
    )

    @property
    def claim_path(self) -> PVCPath | None:
        """Claim and path of a pvc:// source; None for other sources."""
        if not self.source.startswith(PVC_SCHEME):
            return None
        claim, _, path = self.source.removeprefix(PVC_SCHEME).partition("/")
        return PVCPath(claim, path.strip("/"))

    @property
    def image(self) -> str | None:
        """Reference of the artifact of an oci:// source; None for other sources."""
        return _oci_reference(self.source)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.source.startswith(FILE_SCHEME) and "/.." in self.source:
            raise validation_error("source", got=self.source, expected="a path without ..")
        if self.source.startswith(HUB_SCHEME):
            return self
        for field, value in (
            ("revision", self.revision),
            ("tokenSecretRef", self.token_secret_ref),
            ("caBundleRef", self.ca_bundle_ref),
        ):
            if value is not None:
                got = value if isinstance(value, str) else value.to_object()
                raise validation_error(field, got=got, expected="none unless source is hf://")
        return self


def _oci_reference(source: str | None) -> str | None:
    if source is None or not source.startswith(OCI_SCHEME):
        return None
    return source.removeprefix(OCI_SCHEME)


class StoreCacheSpec(ApiModel):
    """Caches of sandboxes, which then need no claim and run on any node."""

    size_limit: ByteQuantity | None = Field(
        None,
        description="Size of each sandbox's cache; room for twice the functions that it holds if "
        "omitted.",
    )
    max_bytes_per_second: ByteQuantity | None = Field(
        None,
        description="Maximum rate at which the store server sends, to all sandboxes together; no "
        "limit if omitted.",
    )
    max_connections: int = Field(
        64, ge=1, le=1024, description="Maximum number of connections to the store server."
    )
    resources: ResourceRequirements | None = Field(
        None,
        description="Resources of the store server. Defaults: requests of 100m CPU and 256Mi of "
        "memory, limits of 2 CPUs and 1Gi.",
    )


_STORE_IMMUTABLE = "immutable: a store cannot move, create another MoEModel"


def _cel_immutable(field: str) -> SchemaExtension:
    unchanged = f"has(self.{field}) == has(oldSelf.{field}) && "
    unchanged += f"(!has(self.{field}) || self.{field} == oldSelf.{field})"
    return cel_rule(unchanged, _STORE_IMMUTABLE, field=f".{field}", reason="FieldValueForbidden")


_NO_CLAIM = "the store is in an image, there is no claim"


class StoreSpec(ApiModel):
    """The store that holds the prepared checkpoint."""

    model_config = model_validations(
        *map(_cel_immutable, ("source", "storageClassName", "accessMode", "claimName", "subPath")),
        cel_rule(
            "quantity(string(self.size)).compareTo(quantity(string(oldSelf.size))) >= 0",
            "expected at least the current size: a volume cannot shrink",
            field=".size",
            reason="FieldValueForbidden",
        ),
        cel_rule(
            "!(has(self.claimName) && has(self.storageClassName))",
            "expected no storageClassName together with claimName: the claim has one already",
            field=".storageClassName",
        ),
        *(
            cel_rule(
                f"!(has(self.source) && has(self.{field}))",
                f"expected no {field} together with source: {_NO_CLAIM}",
                field=f".{field}",
            )
            for field in ("storageClassName", "claimName", "cache")
        ),
    )

    source: Annotated[str, Field(pattern=patterns.OCI_SOURCE, max_length=2048)] | None = Field(
        None,
        description="oci://IMAGE, an OCI artifact with the prepared store, which each node pulls "
        "and pods mount as an image volume; without a claim and without preparation.",
        json_schema_extra=KUBERNETES_ONLY,
    )
    cache: StoreCacheSpec | None = Field(
        None,
        description="Sandboxes fetch the blocks of their functions from a server beside the claim "
        "into caches of their own, so that they run on any node; if omitted they mount the claim.",
        json_schema_extra=KUBERNETES_ONLY,
    )
    path: Annotated[str, Field(min_length=1, max_length=4096)] | None = Field(
        None,
        description="Folder, relative to the MoEModel file; .faasmoe/NAME if omitted.",
        json_schema_extra=PROCESS_ONLY,
    )
    mode: Literal["auto", "copy", "reference"] | None = Field(
        None,
        description="Where weights lie, auto if omitted: auto refers to tensors that the "
        "checkpoint holds as they are served, so that it must stay where it is, and copies the "
        "rest; reference does the same, but fails if experts must be copied; copy copies all.",
        json_schema_extra=PROCESS_ONLY,
    )
    size: ByteQuantity = Field(
        "100Gi",
        description="Size of the claim that is created; slightly more than that of the checkpoint.",
        json_schema_extra=KUBERNETES_ONLY,
    )
    storage_class_name: ObjectName | None = Field(
        None,
        description="Storage class of the claim; the cluster's default if omitted.",
        json_schema_extra=KUBERNETES_ONLY,
    )
    access_mode: Literal["ReadWriteOnce", "ReadWriteMany"] = Field(
        "ReadWriteOnce",
        description="ReadWriteOnce keeps all pods of the model on one node.",
        json_schema_extra=KUBERNETES_ONLY,
    )
    claim_name: ObjectName | None = Field(
        None,
        description="An existing claim to use; if omitted, a claim is created for the model.",
        json_schema_extra=KUBERNETES_ONLY,
    )
    sub_path: Annotated[str, Field(pattern=patterns.RELATIVE_PATH, max_length=512)] | None = Field(
        None,
        description="Folder in the claim; the model's name if omitted.",
        json_schema_extra=KUBERNETES_ONLY
        | validations(
            cel_rule("!self.split('/').exists(part, part == '..')", "expected a path without ..")
        ),
    )
    reclaim_policy: Literal["Delete", "Retain"] = Field(
        "Delete",
        description="What happens to a created claim when the MoEModel is deleted.",
        json_schema_extra=KUBERNETES_ONLY,
    )
    resources: ResourceRequirements | None = Field(
        None,
        description="Resources of the Job that prepares the store. Defaults: requests of 1 CPU and "
        "2Gi of memory, limits of 4 CPUs and 16Gi.",
        json_schema_extra=KUBERNETES_ONLY,
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if ".." in (self.sub_path or "").split("/"):
            raise validation_error("subPath", got=self.sub_path, expected="a path without ..")
        if self.claim_name is not None and self.storage_class_name is not None:
            expected = "none together with claimName: the claim has one already"
            raise validation_error(
                "storageClassName", got=self.storage_class_name, expected=expected
            )
        self._check_without_claim()
        return self

    def _check_without_claim(self) -> None:
        if self.source is None:
            return
        cache = None if self.cache is None else self.cache.to_object()
        for field, value in (
            ("storageClassName", self.storage_class_name),
            ("claimName", self.claim_name),
            ("cache", cache),
        ):
            if value is not None:
                expected = f"none together with source: {_NO_CLAIM}"
                raise validation_error(field, got=value, expected=expected)

    @property
    def image(self) -> str | None:
        """Reference of the artifact that holds the store; None if it is in a claim."""
        return _oci_reference(self.source)
