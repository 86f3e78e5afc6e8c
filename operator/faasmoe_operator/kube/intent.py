"""Whether a live object still is what was asked for, told without asking the API. Pure.

The API server adds defaults and writes values in its own way ("1000m" is "1"), so a live object
can rarely be compared with the intent as it stands. Three things tell whether an apply is due:

- the intent's hash, kept in an annotation of the object: it differs if another intent was applied,
  by an earlier operator too;
- what of the intent the object holds literally: if all of it, nothing is to be done;
- the live object's fingerprint after our last apply: what differs from the intent but has not
  changed since is the server's way of writing it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from faasmoe_operator.kube.kinds import Object

INTENT_ANNOTATION = "faasmoe.dev/intent-hash"
HASH_CHARS = 16
_OWN_METADATA = ("labels", "annotations", "ownerReferences")


def intent_hash(wanted: Object) -> str:
    """Return the hash of what is asked for."""
    return _digest(wanted)


def stamped(wanted: Object) -> Object:
    """Return an intent with its hash in an annotation."""
    annotations = {
        **wanted["metadata"].get("annotations", {}),
        INTENT_ANNOTATION: intent_hash(wanted),
    }
    return {**wanted, "metadata": {**wanted["metadata"], "annotations": annotations}}


def applied_hash(live: Object) -> str | None:
    """Return the hash of the intent that was applied last."""
    found: str | None = live["metadata"].get("annotations", {}).get(INTENT_ANNOTATION)
    return found


def fingerprint(live: Object, wanted: Object) -> str:
    """Return a hash of all of a live object that could be the intent's doing.

    Left out are the status, what the server counts, and labels and annotations of others.
    """
    metadata = {}
    for field in _OWN_METADATA:
        value = live["metadata"].get(field)
        if isinstance(value, Mapping):
            ours = wanted["metadata"].get(field, {})
            value = {key: entry for key, entry in value.items() if key in ours}
        metadata[field] = value or None
    body = {key: value for key, value in live.items() if key not in ("metadata", "status")}
    return _digest({**body, "metadata": metadata})


def holds(live: Any, wanted: Any) -> bool:
    """Return whether all that is wanted stands in a live value literally.

    An object may have more keys than are wanted. A list must have the same length: one more
    container, port or owner is somebody's edit.
    """
    if isinstance(wanted, Mapping):
        return isinstance(live, Mapping) and all(
            _holds_field(live, key, value) for key, value in wanted.items()
        )
    if isinstance(wanted, list):
        return (
            isinstance(live, list)
            and len(live) == len(wanted)
            and all(holds(one, other) for one, other in zip(live, wanted, strict=True))
        )
    return bool(live == wanted) and isinstance(live, bool) == isinstance(wanted, bool)


def _holds_field(live: Mapping[str, Any], key: str, wanted: Any) -> bool:
    if wanted in (None, {}, []) and key not in live:
        return True  # the server drops what is empty
    return key in live and holds(live[key], wanted)


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_CHARS]
