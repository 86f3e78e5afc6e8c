"""Lines of a child's output, long ones cut, so that no output can exhaust memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

MAX_LINE_BYTES = 1 << 16


async def read_lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """Give each line without its end; a line longer than MAX_LINE_BYTES comes in pieces."""
    rest = b""
    while chunk := await stream.read(MAX_LINE_BYTES):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line.decode(errors="replace").rstrip("\r")
        if len(rest) > MAX_LINE_BYTES:
            yield rest.decode(errors="replace")
            rest = b""
    if rest:
        yield rest.decode(errors="replace")
