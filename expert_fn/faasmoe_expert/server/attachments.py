"""What a client asks a sandbox to attach, list or detach: a function, or those of a store. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from faasmoe_contracts.routing_table import FunctionSpec, RoutingTableError
from faasmoe_contracts.text import MAX_REPR_CHARS, short_repr
from faasmoe_contracts.wire import Buffer
from faasmoe_expert.errors import BadAttachment

MAX_PATH_CHARS = 4096
MAX_ATTACHMENTS = 256  # of one request
STORE_FIELDS = frozenset({"store", "model_digest"})
FUNCTION_FIELDS = frozenset({"id", "layers", "experts"})


@dataclass(frozen=True, slots=True)
class Attachment:
    """A function to attach.

    Attributes:
        spec: id, layers and experts of the function.
        store: directory of the store.
        model_digest: expected digest of the store's manifest.
    """

    spec: FunctionSpec
    store: Path
    model_digest: str

    @property
    def source(self) -> dict[str, Any]:
        """Where it is from, as arguments of `SandboxRuntime.attach`."""
        return {"store": self.store, "model_digest": self.model_digest}


def parse_attachment(body: Buffer, function_id: str) -> Attachment:
    """Parse the attachment of the function that a path names; raises BadAttachment."""
    value = parse_object(body)
    _reject_unknown_fields(value, STORE_FIELDS | FUNCTION_FIELDS)
    if value.get("id", function_id) != function_id:
        message = f"id: got {short_repr(value['id'])}, expected {function_id} as in the path"
        raise BadAttachment(message, field="id")
    store, digest = _parse_store(value)
    return Attachment(_parse_spec({**value, "id": function_id}), store, digest)


def parse_attachments(body: Buffer) -> tuple[Attachment, ...]:
    """Parse the attachments of several functions of one store; raises BadAttachment."""
    value = parse_object(body)
    _reject_unknown_fields(value, STORE_FIELDS | {"functions"})
    store, digest = _parse_store(value)
    functions = value.get("functions")
    if not isinstance(functions, list) or not 0 < len(functions) <= MAX_ATTACHMENTS:
        got = len(functions) if isinstance(functions, list) else type(functions).__name__
        message = f"functions: got {got}, expected a list of 1 to {MAX_ATTACHMENTS}"
        raise BadAttachment(message, field="functions")
    for function in functions:
        if not isinstance(function, dict):
            got = type(function).__name__
            raise BadAttachment(f"functions: got {got}, expected objects", field="functions")
        _reject_unknown_fields(function, FUNCTION_FIELDS)
    return tuple(Attachment(_parse_spec(function), store, digest) for function in functions)


def parse_detachment(body: Buffer) -> Path:
    """Parse which store's functions are to be detached; raises BadAttachment."""
    value = parse_object(body)
    _reject_unknown_fields(value, frozenset({"store"}))
    return _parse_path(value)


def parse_listed_store(query: str) -> Path | None:
    """Return the store whose functions a query asks for; None for all. Raises BadAttachment."""
    if not query:
        return None
    values = dict(parse_qsl(query, keep_blank_values=True))
    _reject_unknown_fields(values, frozenset({"store"}))
    return _parse_path(values)


def parse_object(body: Buffer) -> dict[str, Any]:
    """Parse a body that is a JSON object; raises BadAttachment."""
    try:
        value = json.loads(bytes(body).decode("utf-8"))  # json would guess the encoding of bytes
    except (ValueError, RecursionError) as error:
        raise BadAttachment(f"body: not JSON ({error})", field="body") from error
    if not isinstance(value, dict):
        raise BadAttachment(f"body: got {type(value).__name__}, expected an object", field="body")
    return value


def _parse_spec(value: Mapping[str, Any]) -> FunctionSpec:
    try:
        return FunctionSpec.from_json(value)
    except RoutingTableError as error:
        raise BadAttachment(str(error), field=str(error).partition(":")[0]) from error


def _parse_store(value: Mapping[str, Any]) -> tuple[Path, str]:
    return _parse_path(value), _require_text(value, "model_digest")


def _parse_path(value: Mapping[str, Any]) -> Path:
    store = _require_text(value, "store")
    if len(store) > MAX_PATH_CHARS:
        message = f"store: got {len(store)} characters, expected at most {MAX_PATH_CHARS}"
        raise BadAttachment(message, field="store")
    return Path(store)


def _reject_unknown_fields(value: Mapping[str, Any], known: frozenset[str]) -> None:
    for name in sorted(value.keys() - known):
        field = name[:MAX_REPR_CHARS]
        message = f"{field}: got an unknown field, expected {', '.join(sorted(known))}"
        raise BadAttachment(message, field=field)


def _require_text(value: Mapping[str, Any], name: str) -> str:
    text = value.get(name)
    if not isinstance(text, str) or not text or not text.isprintable():
        raise BadAttachment(
            f"{name}: got {short_repr(text)}, expected a printable string", field=name
        )
    return text
