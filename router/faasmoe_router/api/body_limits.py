"""Limits on request bodies, and the check of a body's structure against them before it is parsed.

Parsing and validating JSON holds the interpreter, and costs by the number of values rather than by
bytes: 8 MB of empty objects take seconds, 8 MB of text milliseconds. `check_structure` counts the
values first. It computes with numpy, in slices, which lets other threads run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy
import numpy.typing

from faasmoe_gateway.body_structure import MAX_CONTAINERS, MAX_VALUES
from faasmoe_router.api.errors import ApiError, invalid_json

MAX_BODY_BYTES = 8 << 20  # whatever the model
BASE_BODY_BYTES = 256 << 10  # for tools, schemas and the names of fields
MAX_DEPTH = 128
TOKEN_ID_BYTES = 8  # of a token ID in JSON, with its comma
ESCAPED_BYTES = 2  # of JSON per byte of text, such as escaped newlines
SLICE_BYTES = 256 << 10
QUOTE, BACKSLASH, COMMA, COLON = b'"\\,:'
BRACKETS_OPEN, BRACKETS_CLOSE = b"[{", b"]}"


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """Limits on one request body.

    Attributes:
        max_bytes: largest body.
        max_values: most JSON values and names in it.
        max_containers: most objects and lists among them.
        max_depth: deepest nesting.
    """

    max_bytes: int = MAX_BODY_BYTES
    max_values: int = MAX_VALUES
    max_containers: int = MAX_CONTAINERS
    max_depth: int = MAX_DEPTH

    @classmethod
    def for_model(cls, *, max_model_len: int, max_token_bytes: int, max_prompts: int) -> BodyLimits:
        """Return the limits that let through whatever fits into the model's context.

        Args:
            max_model_len: tokens of one request.
            max_token_bytes: most bytes of text that one token stands for.
            max_prompts: most prompts of one request, as token IDs.
        """
        text_bytes = ESCAPED_BYTES * max_model_len * max_token_bytes
        ids_bytes = TOKEN_ID_BYTES * min(MAX_VALUES, max_model_len * max_prompts)
        return cls(max_bytes=min(MAX_BODY_BYTES, BASE_BODY_BYTES + max(text_bytes, ids_bytes)))


@dataclass(slots=True)
class JsonStructure:
    """What a JSON text holds, counted without parsing it; exact for valid JSON.

    Attributes:
        n_values: values and names, at least.
        n_containers: objects and lists.
        max_depth: deepest nesting.
    """

    n_values: int = 1
    n_containers: int = 0
    max_depth: int = 0


def check_structure(body: bytes, limits: BodyLimits) -> JsonStructure:
    """Return the structure of a body; raises ApiError if it exceeds the limits."""
    if json.detect_encoding(body) not in ("utf-8", "utf-8-sig"):
        raise invalid_json("expected UTF-8")
    structure = measure_structure(body)
    if structure.max_depth > limits.max_depth:
        raise invalid_json("it is nested too deeply")
    for what, got, limit in (
        ("values", structure.n_values, limits.max_values),
        ("objects and lists", structure.n_containers, limits.max_containers),
    ):
        if got > limit:
            raise ApiError(
                f"The request body has too many parts: got {got} {what}, expected at most {limit}.",
                status=413,
                code="request_too_large",
            )
    return structure


def measure_structure(body: bytes) -> JsonStructure:
    """Return the structure of a JSON text in UTF-8; of invalid JSON, something finite."""
    scanner = _StructureScanner()
    for start in range(0, len(body), SLICE_BYTES):
        scanner.scan(numpy.frombuffer(body[start : start + SLICE_BYTES], dtype=numpy.uint8))
    return scanner.structure


class _StructureScanner:
    """Counts structural characters outside strings, slice by slice."""

    def __init__(self) -> None:
        self.structure = JsonStructure()
        self._is_in_string = False
        self._is_escaped = False  # the next byte
        self._depth = 0

    def scan(self, text: numpy.typing.NDArray[numpy.uint8]) -> None:
        """Count one slice.

        Args:
            text: [N], the next bytes.
        """
        inside = numpy.cumsum(self._find_quotes(text), dtype=numpy.int32)  # [N]
        outside = (inside + self._is_in_string) & 1 == 0  # [N]
        self._is_in_string = not outside[-1]
        opens = ((text == BRACKETS_OPEN[0]) | (text == BRACKETS_OPEN[1])) & outside  # [N]
        closes = ((text == BRACKETS_CLOSE[0]) | (text == BRACKETS_CLOSE[1])) & outside  # [N]
        steps = opens.view(numpy.int8) - closes.view(numpy.int8)  # [N]
        depths = numpy.cumsum(steps, dtype=numpy.int32) + self._depth  # [N]
        self._depth = int(depths[-1])
        separators = ((text == COMMA) | (text == COLON)) & outside  # [N]
        n_opens = int(numpy.count_nonzero(opens))
        self.structure.n_containers += n_opens
        self.structure.n_values += n_opens + int(numpy.count_nonzero(separators))
        self.structure.max_depth = max(self.structure.max_depth, int(depths.max()))

    def _find_quotes(
        self, text: numpy.typing.NDArray[numpy.uint8]
    ) -> numpy.typing.NDArray[numpy.bool_]:
        """Return which bytes, [N], are quotes that no backslash escapes."""
        quotes: numpy.typing.NDArray[numpy.bool_] = text == QUOTE
        if self._is_escaped:
            quotes[0] = False
        backslashes = numpy.flatnonzero(text == BACKSLASH)  # [B]
        if not backslashes.size:
            self._is_escaped = False
            return quotes
        order = numpy.arange(backslashes.size)  # [B]
        is_run_start = numpy.diff(backslashes, prepend=-2) != 1  # [B]
        run_starts = numpy.maximum.accumulate(numpy.where(is_run_start, order, 0))  # [B]
        offsets = order - run_starts  # [B], of each backslash in its run
        if self._is_escaped and backslashes[0] == 0:
            offsets[run_starts == 0] += 1
        escaping = backslashes[offsets % 2 == 0]  # each escapes the byte after it
        quotes[escaping[escaping < text.size - 1] + 1] = False
        self._is_escaped = bool(escaping.size) and int(escaping[-1]) == text.size - 1
        return quotes
