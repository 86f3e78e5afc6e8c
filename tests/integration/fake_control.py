"""A fake control process for tests: serves the control API, with faults on request."""

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from aiohttp import web

from faasmoe_contracts.routing_table import FunctionEndpoints, RoutingTable

DEADLINE_S = 120.0
ABORT = b"\0cut"
"""Line of the stream that aborts the connection."""
END_OF_STREAM = b"\0end"
"""Line of the stream that ends the response."""


class FakeControl:
    """Serves a routing table and records requests; all methods are thread-safe.

    Args:
        table: the table.
        token: bearer token that requests must carry; empty accepts any.

    Attributes:
        url: base URL.
        epoch: epoch of the snapshots.
        table: the current table.
        load_reports: bodies of the load reports.
        activation_requests: functions of each activation request.
        usage_reports: bodies of the usage reports.
        usage_totals: usage over all routers in responses; by default what was reported.
        n_rejected: number of rejected requests.
        table_queries: query of each table stream.
        first_lines: returns the first lines of a stream; by default a snapshot.
        on_activation: called with the functions of an activation request, in another thread.
        status: status of every response except the table's, if not 0.
        stall_s: delay of the response to a load report, in seconds.
        table_status: status of the table's response, if not 0.
    """

    def __init__(self, table: RoutingTable, *, token: str = "") -> None:
        self.url = ""
        self.epoch = "first"
        self.table = table
        self.load_reports: list[dict[str, Any]] = []
        self.activation_requests: list[list[str]] = []
        self.usage_reports: list[dict[str, Any]] = []
        self.usage_totals: dict[str, dict[str, float]] = {}
        self.table_queries: list[dict[str, str]] = []
        self.first_lines: Callable[[], Sequence[bytes]] = lambda: [self.snapshot()]
        self.on_activation: Callable[[list[str]], None] = lambda _: None
        self.status = 0
        self.table_status = 0
        self.n_rejected = 0
        self.stall_s = 0.0
        self._token = token
        self._streams: set[asyncio.Queue[bytes]] = set()
        self._loop = asyncio.new_event_loop()
        self._runner: web.AppRunner | None = None
        self._port = 0

    def snapshot(self) -> bytes:
        """Return the line of a snapshot."""
        return self._line(
            kind="snapshot",
            epoch=self.epoch,
            version=self.table.version,
            table=self.table.to_json(),
        )

    def set_addresses(self, addresses: Mapping[str, Sequence[str]]) -> None:
        """Change the addresses of functions and send an update to every stream."""
        entries = tuple(
            FunctionEndpoints(e.spec, tuple(addresses.get(e.spec.id, e.addresses)))
            for e in self.table.functions
        )
        version = self.table.version + 1
        self.table = RoutingTable(self.table.model_digest, version, entries)
        changed = [{"id": name, "addresses": list(hosts)} for name, hosts in addresses.items()]
        self.send_line(self._line(kind="change", version=version, functions=changed))

    def send_line(self, line: bytes) -> None:
        """Send a line to every stream."""

        def enqueue() -> None:
            for stream in self._streams:
                stream.put_nowait(line)

        self._loop.call_soon_threadsafe(enqueue)

    def stop(self) -> None:
        """Stop listening and close every connection."""
        self._run_on_loop(self._stop())

    def start(self) -> None:
        """Listen, on the same port as before."""
        self._run_on_loop(self._start())

    @contextmanager
    def running(self) -> Iterator["FakeControl"]:
        """Run until the block ends."""
        thread = threading.Thread(target=self._loop.run_forever)
        thread.start()
        try:
            self.start()
            yield self
        finally:
            self.stop()
            self._run_on_loop(self._loop.shutdown_default_executor())
            self._loop.call_soon_threadsafe(self._loop.stop)
            thread.join(DEADLINE_S)
            self._loop.close()

    def _run_on_loop(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(DEADLINE_S)

    def _line(self, **message: Any) -> bytes:
        return json.dumps(message).encode() + b"\n"

    async def _start(self) -> None:
        app = web.Application()
        app.router.add_get("/v1/table", self._handle_table)
        app.router.add_post("/v1/load", self._handle_load)
        app.router.add_post("/v1/wake", self._handle_wake)
        app.router.add_post("/v1/usage", self._handle_usage)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port, reuse_address=True)
        await site.start()
        self._port = self._runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{self._port}"

    async def _stop(self) -> None:
        if self._runner is not None:
            for stream in self._streams:
                stream.put_nowait(ABORT)
            await self._runner.cleanup()
            self._runner = None

    def _check_request(self, request: web.Request, status: int) -> None:
        if self._token and request.headers.get("authorization") != f"Bearer {self._token}":
            status = 401
        if status:
            self.n_rejected += 1
            raise _http_error(status)

    async def _handle_table(self, request: web.Request) -> web.StreamResponse:
        self.table_queries.append(dict(request.query))
        self._check_request(request, self.table_status)
        lines: asyncio.Queue[bytes] = asyncio.Queue()
        for line in self.first_lines():
            lines.put_nowait(line)
        self._streams.add(lines)
        response = web.StreamResponse(headers={"content-type": "application/x-ndjson"})
        await response.prepare(request)
        try:
            while (line := await lines.get()) != END_OF_STREAM:
                if line == ABORT:
                    assert request.transport is not None
                    request.transport.abort()
                    break
                await response.write(line)
        except ConnectionError:
            pass  # the reader has disconnected
        finally:
            self._streams.discard(lines)
        return response

    async def _handle_load(self, request: web.Request) -> web.Response:
        self._check_request(request, self.status)
        await asyncio.sleep(self.stall_s)
        self.load_reports.append(await request.json())
        return web.Response(status=204)

    async def _handle_wake(self, request: web.Request) -> web.Response:
        self._check_request(request, self.status)
        names = (await request.json())["functions"]
        self.activation_requests.append(names)
        self._loop.run_in_executor(None, self.on_activation, names)
        return web.Response(status=202)

    async def _handle_usage(self, request: web.Request) -> web.Response:
        self._check_request(request, self.status)
        body = await request.json()
        self.usage_reports.append(body)
        return web.json_response({"since_s": 90.0, "tenants": self.usage_totals or body["tenants"]})


def _http_error(status: int) -> web.HTTPException:
    kinds: dict[int, type[web.HTTPException]] = {
        401: web.HTTPUnauthorized,
        422: web.HTTPUnprocessableEntity,
        503: web.HTTPServiceUnavailable,
    }
    return kinds[status](text="rejected by the test")
