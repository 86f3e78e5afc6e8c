"""What the control API refuses, and the error objects that say so.

What routers send: read strictly, and refused as a whole if anything in it is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Container
from typing import Annotated, TypeVar

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from faasmoe_operator.api.v1alpha1.field_types import DNSLabel
from faasmoe_operator.api.v1alpha1.tenants import MAX_TENANTS
from faasmoe_operator.control.load_reports import LoadReport, ReportedLoad
from faasmoe_operator.control.usage_ledger import MAX_TENANTS_IN_LEDGER, TenantUsage, UsageReport


class RequestRejected(Exception):
    """A request that is refused and has changed nothing.

    Attributes:
        status: the HTTP status.
        code: machine-stable.
        field: the field at fault, None if it is none of the body's.
    """

    def __init__(self, message: str, *, status: int, code: str, field: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.field = status, code, field

    def response(self) -> web.Response:
        """Return the HTTP answer."""
        error = {"code": self.code, "message": str(self), "field": self.field}
        return web.Response(
            status=self.status,
            text=json.dumps({"error": error}),
            content_type="application/json",
        )


def invalid_field(field: str, received: object, expected: str) -> RequestRejected:
    """Return the refusal of a field's value."""
    shown = repr(received)
    shown = shown if len(shown) <= 80 else shown[:80] + "…"
    message = f"{field}: got {shown}, expected {expected}"
    return RequestRejected(message, status=422, code="invalid", field=field)


MAX_INTERVAL_S = 60.0
MAX_COUNT = 1 << 53

Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=MAX_COUNT)]
RouterName = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
FunctionName = Annotated[str, Field(max_length=64)]


class _RequestBody(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class _FunctionLoadBody(_RequestBody):
    concurrency: Annotated[float, Field(ge=0, le=1e9)]
    calls: Count
    rows: Count


class _LoadReportBody(_RequestBody):
    router: RouterName
    sent_at_s: float
    interval_s: Annotated[float, Field(gt=0, le=MAX_INTERVAL_S)]
    functions: dict[FunctionName, _FunctionLoadBody]
    held: Count
    local: Count
    tenants: Annotated[dict[DNSLabel, Count], Field(max_length=MAX_TENANTS)] = {}


class _TenantUsageBody(_RequestBody):
    prompt_tokens: Count
    generated_tokens: Count
    completed: Count
    cancelled: Count
    failed: Count
    limited: Count
    expert_seconds: NonNegativeFloat
    expert_gb_seconds: NonNegativeFloat


class _UsageReportBody(_RequestBody):
    book: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    since_s: NonNegativeFloat
    ends: bool = False
    tenants: Annotated[dict[DNSLabel, _TenantUsageBody], Field(max_length=MAX_TENANTS_IN_LEDGER)]


class _ActivationBody(_RequestBody):
    router: RouterName
    sent_at_s: float
    functions: Annotated[list[FunctionName], Field(min_length=1, max_length=1_000_000)]


AnyBody = TypeVar("AnyBody", bound=_RequestBody)


def parse_load_report(content: bytes, *, known: Container[str]) -> LoadReport:
    """Return a load report; raises Refusal.

    Args:
        content: the request's body.
        known: the functions of this model.
    """
    body = _parse(_LoadReportBody, content)
    for name in body.functions:
        _check_known(name, known)
    functions = {
        name: ReportedLoad(load.concurrency, load.calls, load.rows)
        for name, load in body.functions.items()
    }
    return LoadReport(
        body.router,
        functions,
        queued=body.held,
        n_local_blocks=body.local,
        tenant_key_counts=body.tenants,
    )


def parse_usage_report(content: bytes) -> UsageReport:
    """Return what a router says that the tenants have used; raises Refusal."""
    body = _parse(_UsageReportBody, content)
    tenants = {name: TenantUsage(**dict(use)) for name, use in body.tenants.items()}
    return UsageReport(body.book, body.since_s, tenants, is_final=body.ends)


def parse_activation_request(content: bytes, *, known: Container[str]) -> list[str]:
    """Return the functions to wake; raises Refusal."""
    body = _parse(_ActivationBody, content)
    for name in body.functions:
        _check_known(name, known)
    return body.functions


def _parse(body_type: type[AnyBody], content: bytes) -> AnyBody:
    try:
        return body_type.model_validate_json(content)
    except ValidationError as error:
        detail = error.errors(include_url=False, include_context=False)[0]
        field = ".".join(str(part) for part in detail["loc"]) or "body"
        raise invalid_field(
            field, _received(detail["type"], detail["input"]), detail["msg"]
        ) from error


def _received(kind: str, value: object) -> object:
    if kind == "json_invalid":
        return "no JSON"
    return "nothing" if kind == "missing" else value


def _check_known(name: str, known: Container[str]) -> None:
    if name not in known:
        raise invalid_field("functions", name, "a function of this model")


__all__ = ["RequestRejected", "parse_activation_request", "parse_load_report", "parse_usage_report"]
