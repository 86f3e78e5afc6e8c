"""What routers send: read strictly, and refused as a whole if anything in it is wrong."""

from __future__ import annotations

from collections.abc import Container
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from faasmoe_operator.control.api.errors import Refusal, invalid
from faasmoe_operator.control.ledger import MAX_ACCOUNTS, Statement, Use
from faasmoe_operator.control.reports import FunctionLoad, LoadReport
from faasmoe_operator.spec.references import Label
from faasmoe_operator.spec.tenants import MAX_TENANTS

MAX_INTERVAL_S = 60.0
MAX_COUNT = 1 << 53

Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Amount = Annotated[float, Field(ge=0, le=MAX_COUNT)]
RouterName = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
FunctionName = Annotated[str, Field(max_length=64)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class _FunctionBody(_Body):
    concurrency: Annotated[float, Field(ge=0, le=1e9)]
    calls: Count
    rows: Count


class _LoadBody(_Body):
    router: RouterName
    sent_at_s: float
    interval_s: Annotated[float, Field(gt=0, le=MAX_INTERVAL_S)]
    functions: dict[FunctionName, _FunctionBody]
    held: Count
    local: Count
    tenants: Annotated[dict[Label, Count], Field(max_length=MAX_TENANTS)] = {}


class _UseBody(_Body):
    prompt_tokens: Count
    generated_tokens: Count
    completed: Count
    cancelled: Count
    failed: Count
    limited: Count
    expert_seconds: Amount
    expert_gb_seconds: Amount


class _UsageBody(_Body):
    book: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    since_s: Amount
    ends: bool = False
    tenants: Annotated[dict[Label, _UseBody], Field(max_length=MAX_ACCOUNTS)]


class _WakeBody(_Body):
    router: RouterName
    sent_at_s: float
    functions: Annotated[list[FunctionName], Field(min_length=1, max_length=1_000_000)]


AnyBody = TypeVar("AnyBody", bound=_Body)


def read_load(content: bytes, *, known: Container[str]) -> LoadReport:
    """Return a load report; raises Refusal.

    Args:
        content: the request's body.
        known: the functions of this model.
    """
    body = _read(_LoadBody, content)
    for name in body.functions:
        _check_known(name, known)
    functions = {
        name: FunctionLoad(load.concurrency, load.calls, load.rows)
        for name, load in body.functions.items()
    }
    return LoadReport(
        body.router, functions, held=body.held, local=body.local, tenants=body.tenants
    )


def read_usage(content: bytes) -> Statement:
    """Return what a router says that the tenants have used; raises Refusal."""
    body = _read(_UsageBody, content)
    tenants = {name: Use(**dict(use)) for name, use in body.tenants.items()}
    return Statement(body.book, body.since_s, tenants, ends=body.ends)


def read_wake(content: bytes, *, known: Container[str]) -> list[str]:
    """Return the functions to wake; raises Refusal."""
    body = _read(_WakeBody, content)
    for name in body.functions:
        _check_known(name, known)
    return body.functions


def _read(kind: type[AnyBody], content: bytes) -> AnyBody:
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        detail = error.errors(include_url=False, include_context=False)[0]
        field = ".".join(str(part) for part in detail["loc"]) or "body"
        raise invalid(field, _got(detail["type"], detail["input"]), detail["msg"]) from error


def _got(kind: str, value: object) -> object:
    if kind == "json_invalid":
        return "no JSON"
    return "nothing" if kind == "missing" else value


def _check_known(name: str, known: Container[str]) -> None:
    if name not in known:
        raise invalid("functions", name, "a function of this model")


__all__ = ["Refusal", "read_load", "read_usage", "read_wake"]
