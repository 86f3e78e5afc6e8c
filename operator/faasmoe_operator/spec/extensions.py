"""What the CRD says beyond types and bounds: CEL rules, merging of lists, where a field holds.

Each stands beside the pydantic field or rule that it repeats for the Kubernetes API server;
`crd.py` carries them over.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict

VALIDATIONS = "x-kubernetes-validations"
PLATFORM = "x-faasmoe-platform"  # ours: read by platform.py and crd.py, never in the CRD

Extension = dict[str, Any]
Reason = Literal[
    "FieldValueInvalid", "FieldValueForbidden", "FieldValueRequired", "FieldValueDuplicate"
]

KUBERNETES_ONLY: Extension = {PLATFORM: "kubernetes"}
PROCESS_ONLY: Extension = {PLATFORM: "process"}
SET: Extension = {"x-kubernetes-list-type": "set"}


def map_list(key: str) -> Extension:
    """Mark a list whose entries are told apart by a field, so that appliers may share it."""
    return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [key]}


def cel(
    rule: str, message: str, *, field: str | None = None, reason: Reason | None = None
) -> Extension:
    """Return one rule for the API server.

    Args:
        rule: the expression; `self` is what it stands at, `oldSelf` what it was before.
        message: what was expected, and what to do.
        field: path of the field to name, such as `.minScale`; the place of the rule if left out.
        reason: what kind of fault it is; the API server's default is FieldValueInvalid.
    """
    places = {"fieldPath": field, "reason": reason}
    named = {name: value for name, value in places.items() if value is not None}
    return {"rule": rule, "message": message, **named}


def checked(*rules: Extension) -> Extension:
    """Mark a field with the rules that the API server checks at it."""
    return {VALIDATIONS: list(rules)}


def rules(*cel_rules: Extension) -> ConfigDict:
    """Return the configuration of a part with rules over several of its fields."""
    return ConfigDict(json_schema_extra=checked(*cel_rules))
