"""Fan-out clients that are called from the engine's thread and block until all responses arrive.

All but the product's run on an event loop: the engine's thread submits the work and blocks, as a
synchronous engine must.
"""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import aiohttp
import httptools
import numpy as np
import uvloop
from benchmarks.echo_servers import RunningServers

from faasmoe_contracts.wire import (
    Buffer,
    Dtype,
    Float32s,
    FrameHeader,
    FrameKind,
    Int32s,
    OutputMode,
    decode_response,
    encode_request,
)
from faasmoe_router.dispatch.fanout import Fanout
from faasmoe_router.dispatch.transport import MIN_SHARED_FRAME_BYTES, Call, CallError

PATH = "/v1/functions/0123456789abcdef01234567"
HIDDEN_SIZE, TOP_K = 2048, 4
NewLoop = Callable[[], asyncio.AbstractEventLoop]


class FanoutBenchmarkClient(ABC):
    """A client that makes fan-outs."""

    @abstractmethod
    def post(self, bodies: Sequence[bytes]) -> list[bytes]:
        """Send each server one body; return all responses."""

    def time_s(self, bodies: Sequence[bytes], n_fanouts: int) -> list[float]:
        """Make fan-outs sequentially; return the duration of each in seconds."""
        times_s = []
        for _ in range(n_fanouts):
            started_s = time.perf_counter()
            self.post(bodies)
            times_s.append(time.perf_counter() - started_s)
        return times_s


@contextmanager
def running_loop_thread(new_loop: NewLoop) -> Iterator[asyncio.AbstractEventLoop]:
    """Run an event loop in a thread while the context is active."""
    loop = new_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


class AiohttpClient(FanoutBenchmarkClient):
    """aiohttp's client."""

    def __init__(self, loop: asyncio.AbstractEventLoop, addresses: Sequence[str]) -> None:
        self.loop = loop
        self._urls = [f"http://{address}{PATH}" for address in addresses]
        self._session = asyncio.run_coroutine_threadsafe(self._open(), loop).result()

    def post(self, bodies: Sequence[bytes]) -> list[bytes]:
        """Send each server one body; return all responses."""
        return asyncio.run_coroutine_threadsafe(self.gather(bodies), self.loop).result()

    async def gather(self, bodies: Sequence[bytes]) -> list[bytes]:
        """Do the same as `post`, on the loop."""
        return await asyncio.gather(*map(self._post, self._urls, bodies))

    async def gather_timed(self, bodies: Sequence[bytes], n_fanouts: int) -> list[float]:
        """Make fan-outs sequentially on the loop; return the duration of each in seconds."""
        times_s = []
        for _ in range(n_fanouts):
            started_s = time.perf_counter()
            await self.gather(bodies)
            times_s.append(time.perf_counter() - started_s)
        return times_s

    def close(self) -> None:
        """Close the connections."""
        asyncio.run_coroutine_threadsafe(self._session.close(), self.loop).result()

    async def _open(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(auto_decompress=False)

    async def _post(self, url: str, body: bytes) -> bytes:
        async with self._session.post(url, data=body) as response:
            return await response.read()


class InLoopClient(FanoutBenchmarkClient):
    """aiohttp without the hop between threads: the cost for an asynchronous engine."""

    def __init__(self, client: AiohttpClient) -> None:
        self._client = client

    def post(self, bodies: Sequence[bytes]) -> list[bytes]:
        """Send each server one body; return all responses."""
        return self._client.post(bodies)

    def time_s(self, bodies: Sequence[bytes], n_fanouts: int) -> list[float]:
        """Make fan-outs sequentially on the loop; return the duration of each in seconds."""
        work = self._client.gather_timed(bodies, n_fanouts)
        return asyncio.run_coroutine_threadsafe(work, self._client.loop).result()


class _ResponseConnection(asyncio.Protocol):
    """One keep-alive connection: parsed by httptools, its body set as a future's result."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._response: asyncio.Future[bytes] | None = None
        self._parser = httptools.HttpResponseParser(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._response is not None and not self._response.done():
            self._response.set_exception(exc or ConnectionError("the server closed the connection"))

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self._parts.append(body)

    def on_message_complete(self) -> None:
        assert self._response is not None
        self._response.set_result(b"".join(self._parts))

    def post(self, head: bytes, body: bytes) -> asyncio.Future[bytes]:
        self._parts = []
        self._response = asyncio.get_running_loop().create_future()
        self._transport.writelines([head, body])
        return self._response

    def close(self) -> None:
        self._transport.close()


class ProtocolClient(FanoutBenchmarkClient):
    """asyncio.Protocol with httptools, as lean as the sandbox's server."""

    def __init__(self, loop: asyncio.AbstractEventLoop, addresses: Sequence[str]) -> None:
        self._loop = loop
        self._addresses = addresses
        self._connections = asyncio.run_coroutine_threadsafe(self._open(), loop).result()

    def post(self, bodies: Sequence[bytes]) -> list[bytes]:
        """Send each server one body; return all responses."""
        return asyncio.run_coroutine_threadsafe(self._gather(bodies), self._loop).result()

    def close(self) -> None:
        """Close the connections."""
        for connection in self._connections:
            self._loop.call_soon_threadsafe(connection.close)

    async def _open(self) -> list[_ResponseConnection]:
        loop, connections = asyncio.get_running_loop(), []
        for address in self._addresses:
            host, _, port = address.rpartition(":")
            _, connection = await loop.create_connection(_ResponseConnection, host, int(port))
            connections.append(connection)
        return connections

    async def _gather(self, bodies: Sequence[bytes]) -> list[bytes]:
        calls = zip(self._connections, self._addresses, bodies, strict=True)
        return await asyncio.gather(*(c.post(_head(a, len(b)), b) for c, a, b in calls))


def _head(address: str, size_bytes: int) -> bytes:
    return (
        f"POST {PATH} HTTP/1.1\r\nhost: {address}\r\ncontent-length: {size_bytes}\r\n\r\n"
    ).encode()


class FanoutClient(FanoutBenchmarkClient):
    """The product's client: sockets polled by the engine's thread."""

    def __init__(
        self, servers: RunningServers, *, min_shared_bytes: int = MIN_SHARED_FRAME_BYTES
    ) -> None:
        self._addresses = servers.addresses
        self._fanout = Fanout(socket_dir=servers.socket_dir, min_shared_bytes=min_shared_bytes)
        self._function_id = PATH.rpartition("/")[2]

    def post(self, bodies: Sequence[bytes]) -> list[bytes]:
        """Send each server one body; return all responses."""
        return self._run([[body] for body in bodies], bytes)

    def close(self) -> None:
        """Close the connections."""
        self._fanout.close()

    def _run(
        self, frames: Sequence[Sequence[Any]], read: Callable[[memoryview], bytes]
    ) -> list[bytes]:
        responses = [b""] * len(frames)

        def on_response(position: int, body: memoryview) -> None:
            responses[position] = read(body)

        calls = [
            Call(address, self._function_id, frame)
            for address, frame in zip(self._addresses, frames, strict=True)
        ]
        errors: dict[int, CallError] = self._fanout.run(calls, on_response)
        if errors:
            raise ConnectionError(f"calls failed: {errors}")
        return responses


class FrameClient(FanoutClient):
    """The product's client, with every body in a frame of the wire format."""

    def post(self, bodies: Sequence[bytes]) -> list[bytes]:
        """Send each server the body's rows; return the rows of all responses."""
        template = _FrameTemplate.for_body(len(bodies[0]))
        frames = [template.encode(body) for body in bodies]
        return self._run(frames, lambda frame: bytes(decode_response(frame, template.header)))


@dataclass(frozen=True, slots=True)
class _FrameTemplate:
    """A frame's header, and `TOP_K` pairs for each of its rows."""

    header: FrameHeader
    pair_row: Int32s
    pair_expert: Int32s
    pair_weight: Float32s

    @classmethod
    @functools.cache
    def for_body(cls, body_bytes: int) -> _FrameTemplate:
        n_rows = body_bytes // (HIDDEN_SIZE * Dtype.FLOAT32.itemsize)  # as answers are
        rows = np.arange(n_rows, dtype=np.int32).repeat(TOP_K)  # [P]
        experts = np.tile(np.arange(TOP_K, dtype=np.int32), n_rows)  # [P]
        weights = np.ones(len(rows), dtype=np.float32)  # [P]
        header = FrameHeader(
            FrameKind.REQUEST, Dtype.FLOAT32, OutputMode.REDUCED, 0, n_rows, len(rows), HIDDEN_SIZE
        )
        return cls(header, rows, experts, weights)

    def encode(self, body: bytes) -> list[Buffer]:
        return encode_request(
            body,
            dtype=self.header.dtype,
            mode=self.header.mode,
            layer=self.header.layer,
            hidden_size=self.header.hidden_size,
            n_rows=self.header.n_rows,
            pair_row=self.pair_row,
            pair_expert=self.pair_expert,
            pair_weight=self.pair_weight,
        )


def new_uvloop() -> asyncio.AbstractEventLoop:
    """Return a new uvloop event loop."""
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop
