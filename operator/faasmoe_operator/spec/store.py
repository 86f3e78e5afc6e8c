"""Where the prepared checkpoint lies: a folder for `faasmoe up`, a claim on Kubernetes."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from faasmoe_operator.spec import patterns
from faasmoe_operator.spec.base import Part, rule_broken
from faasmoe_operator.spec.extensions import (
    KUBERNETES_ONLY,
    PROCESS_ONLY,
    Extension,
    cel,
    checked,
    rules,
)
from faasmoe_operator.spec.pod_template import Resources
from faasmoe_operator.spec.quantity import ByteQuantity
from faasmoe_operator.spec.references import ObjectName

_FIXED = "expected what it was: a store cannot move, make another MoEModel"


def _fixed(field: str) -> Extension:
    same = f"has(self.{field}) == has(oldSelf.{field}) && "
    same += f"(!has(self.{field}) || self.{field} == oldSelf.{field})"
    return cel(same, _FIXED, field=f".{field}", reason="FieldValueForbidden")


class Store(Part):
    """Where the prepared checkpoint lies."""

    model_config = rules(
        *map(_fixed, ("storageClassName", "accessMode", "claimName", "subPath")),
        cel(
            "quantity(string(self.size)).compareTo(quantity(string(oldSelf.size))) >= 0",
            "expected no less than it was: a volume can grow, not shrink",
            field=".size",
            reason="FieldValueForbidden",
        ),
        cel(
            "!(has(self.claimName) && has(self.storageClassName))",
            "expected no storageClassName beside claimName: that claim has one already",
            field=".storageClassName",
        ),
    )

    path: Annotated[str, Field(min_length=1, max_length=4096)] | None = Field(
        None,
        description="Folder, relative to the MoEModel file; .faasmoe/NAME beside it if left out.",
        json_schema_extra=PROCESS_ONLY,
    )
    size: ByteQuantity = Field(
        "100Gi",
        description="Size of the claim that is made: that of the checkpoint and a little more.",
        json_schema_extra=KUBERNETES_ONLY,
    )
    storage_class_name: ObjectName | None = Field(
        None,
        description="Storage class of the claim; the cluster's default if left out.",
        json_schema_extra=KUBERNETES_ONLY,
    )
    access_mode: Literal["ReadWriteOnce", "ReadWriteMany"] = Field(
        "ReadWriteOnce",
        description="ReadWriteOnce keeps all pods of the model on one node.",
        json_schema_extra=KUBERNETES_ONLY,
    )
    claim_name: ObjectName | None = Field(
        None,
        description="An existing claim to use; one of its own is made if left out.",
        json_schema_extra=KUBERNETES_ONLY,
    )
    sub_path: Annotated[str, Field(pattern=patterns.RELATIVE_PATH, max_length=512)] | None = Field(
        None,
        description="Folder in the claim; the model's name if left out.",
        json_schema_extra=KUBERNETES_ONLY
        | checked(cel("!self.split('/').exists(part, part == '..')", "expected a path without ..")),
    )
    reclaim_policy: Literal["Delete", "Retain"] = Field(
        "Delete",
        description="What becomes of the claim that was made when the MoEModel is deleted.",
        json_schema_extra=KUBERNETES_ONLY,
    )
    resources: Resources | None = Field(
        None,
        description="What the Job that prepares the store asks for and may use at most; of what is "
        "left out, 1 CPU of at most 4 and 2Gi of memory of at most 16Gi.",
        json_schema_extra=KUBERNETES_ONLY,
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if ".." in (self.sub_path or "").split("/"):
            raise rule_broken("subPath", got=self.sub_path, expected="a path without ..")
        if self.claim_name is not None and self.storage_class_name is not None:
            expected = "none beside claimName: that claim has one already"
            raise rule_broken("storageClassName", got=self.storage_class_name, expected=expected)
        return self
