"""An OpenTelemetry collector of the tests' own: takes spans with OTLP over HTTP and keeps them."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from faasmoe_up import wait_until


@dataclass(frozen=True)
class CollectedSpan:
    """A span as it was sent.

    Attributes:
        service: the process's kind.
        name: its name.
        trace_id: its trace, hexadecimal.
        span_id: its id, hexadecimal.
        parent_id: its parent's id; empty for none.
        start_ns: when it began, since the epoch.
        end_ns: when it ended.
        attributes: its attributes.
        links: (trace id, span id) of spans that it refers to.
        is_error: whether it failed.
    """

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]
    links: tuple[tuple[str, str], ...]
    is_error: bool

    @property
    def seconds(self) -> float:
        """Its duration."""
        return (self.end_ns - self.start_ns) / 1e9


@dataclass
class OtlpCollector:
    """A running collector.

    Attributes:
        url: what to name as the endpoint.
        spans: what has arrived, in its order.
        status: what it answers; another one than 200 takes nothing.
    """

    url: str
    spans: list[CollectedSpan] = field(default_factory=list)
    status: int = 200

    def named(self, service: str, name: str) -> list[CollectedSpan]:
        """Return the spans of a kind of process whose names begin like this."""
        return [s for s in self.spans if s.service == service and s.name.startswith(name)]

    def wait_for(self, service: str, name: str, *, n: int = 1) -> list[CollectedSpan]:
        """Return such spans once there are `n`."""
        wait_until(
            lambda: len(self.named(service, name)) >= n,
            timeout_s=60,
            what=f"{n} spans {name!r} of {service}; got {[s.name for s in self.spans]}",
        )
        return self.named(service, name)

    def children(self, parent: CollectedSpan) -> list[CollectedSpan]:
        """Return a span's children by their start."""
        found = [s for s in self.spans if s.parent_id == parent.span_id]
        return sorted(found, key=lambda s: s.start_ns)

    def tree(self, root: CollectedSpan) -> list[str]:
        """Return a span and what is below it as lines of text."""
        lines = [
            f"{root.service.removeprefix('faasmoe-')}: {root.name}  {1e3 * root.seconds:.1f} ms"
        ]
        for child in self.children(root):
            lines += [f"  {line}" for line in self.tree(child)]
        return lines


@contextmanager
def running_collector() -> Iterator[OtlpCollector]:
    """Run a collector on a free port of loopback."""
    collector = OtlpCollector("")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            if collector.status == 200 and self.path == "/v1/traces":
                collector.spans += parse_spans(body)
            self.send_response(collector.status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    collector.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield collector
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def parse_spans(body: bytes) -> list[CollectedSpan]:
    """Return the spans of an ExportTraceServiceRequest."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
        ExportTraceServiceRequest,
    )

    spans = []
    for resource_spans in ExportTraceServiceRequest.FromString(body).resource_spans:
        resource = _attributes(resource_spans.resource.attributes)
        for scope_spans in resource_spans.scope_spans:
            spans += [_to_span(str(resource["service.name"]), s) for s in scope_spans.spans]
    return spans


def _to_span(service: str, span: Any) -> CollectedSpan:
    return CollectedSpan(
        service,
        span.name,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        _attributes(span.attributes),
        tuple((link.trace_id.hex(), link.span_id.hex()) for link in span.links),
        span.status.code == 2,
    )


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(entry) for entry in value.array_value.values]
    return getattr(value, kind)
