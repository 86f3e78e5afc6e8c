"""The function table as an endless stream of JSON lines.

A reader that is slow holds up nothing: it is told what changed since its last line when it is ready
for the next one. One that takes no bytes at all is cut.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable
from typing import Any

from aiohttp import web

from faasmoe_operator.control.table_feed import TableFeed

logger = logging.getLogger(__name__)

PING_S = 5.0
STUCK_S = 30.0


async def stream_table(
    request: web.Request, feed: TableFeed, *, closing: asyncio.Event
) -> web.StreamResponse:
    """Answer GET /v1/table until the reader goes or the control ends."""
    version = _known_version(request, feed)
    response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
    await response.prepare(request)
    feed.n_followers += 1
    try:
        while not closing.is_set() and not feed.is_closed:
            line, version = _next_line(feed, version)
            async with asyncio.timeout(STUCK_S):
                await response.write(json.dumps(line).encode() + b"\n")
            await _first_of(feed.beyond(version), closing.wait(), timeout_s=PING_S)
    except TimeoutError:
        logger.warning("a table stream is cut: it took nothing for %g s", STUCK_S)
    except ConnectionError as error:
        logger.info("a table stream ended: %s", error)
    finally:
        feed.n_followers -= 1
    return response


def _known_version(request: web.Request, feed: TableFeed) -> int | None:
    """Return the version that the reader has; None if it has none of this control's."""
    version = request.query.get("version", "")
    if request.query.get("epoch") != feed.epoch or not version.isdecimal() or len(version) > 18:
        return None
    return int(version)


def _next_line(feed: TableFeed, version: int | None) -> tuple[dict[str, Any], int]:
    """Return what a reader at this version is told, and the version that it has then."""
    changes = None if version is None else feed.since(version)
    if changes is None:
        table = feed.table.to_json()
        line = {"kind": "snapshot", "epoch": feed.epoch, "version": feed.version, "table": table}
    elif changes:
        functions = [{"id": name, "addresses": list(a)} for name, a in changes.items()]
        line = {"kind": "change", "version": feed.version, "functions": functions}
    else:
        line = {"kind": "ping", "version": feed.version}
    return line, feed.version


async def _first_of(*works: Awaitable[object], timeout_s: float) -> None:
    """Wait until one of these has ended, or the time has passed."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
