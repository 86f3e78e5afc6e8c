"""Names of other objects in the model's namespace, and names and labels in general."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from faasmoe_operator.spec import patterns
from faasmoe_operator.spec.base import Part

Label = Annotated[str, Field(pattern=patterns.LABEL, max_length=63)]
ObjectName = Annotated[str, Field(pattern=patterns.SUBDOMAIN, max_length=253)]
SecretKey = Annotated[str, Field(pattern=patterns.SECRET_KEY, max_length=253)]
LabelKey = Annotated[str, Field(pattern=patterns.QUALIFIED_NAME, max_length=317)]
LabelValue = Annotated[str, Field(pattern=patterns.LABEL_VALUE, max_length=63)]
Labels = Annotated[dict[LabelKey, LabelValue], Field(max_length=32)]
AnnotationValue = Annotated[str, Field(max_length=32_768)]
Annotations = Annotated[dict[LabelKey, AnnotationValue], Field(max_length=32)]


class ObjectReference(Part):
    """An object of the model's namespace."""

    name: ObjectName


class KeyReference(Part):
    """One key of a Secret or ConfigMap of the model's namespace."""

    name: ObjectName
    key: SecretKey
