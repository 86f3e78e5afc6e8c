"""Requests of routers: parsed strictly, checked against the model, or rejected as a whole.

The messages and their bounds are those of `faasmoe_contracts`; here they become HTTP errors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Container, Iterable
from typing import TypeVar

from aiohttp import web

from faasmoe_contracts.control_messages import ActivationRequest, LoadReport
from faasmoe_contracts.json_reader import ContractError, ObjectReader, parse_json
from faasmoe_contracts.router_demand import RouterReport
from faasmoe_contracts.text import short_repr
from faasmoe_contracts.usage import UsageReport
from faasmoe_operator.plan.router_memory import RouterMemory

Message = TypeVar("Message")
_MODEL_NAME = re.compile(r"[^\n]{1,256}")


class RequestRejected(Exception):
    """A rejected request; it has changed nothing.

    Attributes:
        status: HTTP status.
        code: stable, machine-readable code.
        field: the invalid field of the body; None if the error is not about the body.
    """

    def __init__(self, message: str, *, status: int, code: str, field: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.field = status, code, field

    def response(self) -> web.Response:
        """Return the HTTP response."""
        error = {"code": self.code, "message": str(self), "field": self.field}
        return web.Response(
            status=self.status,
            text=json.dumps({"error": error}),
            content_type="application/json",
        )


def invalid_field(field: str, received: object, expected: str) -> RequestRejected:
    """Return the rejection of a field's value."""
    return _reject(ContractError(field, short_repr(received), expected))


def parse_load_report(content: bytes, *, known: Container[str]) -> LoadReport:
    """Return a load report.

    Args:
        content: body of the request.
        known: ids of the model's functions.

    Raises:
        RequestRejected: the body is invalid or names an unknown function.
    """
    report = _parse(LoadReport.from_json, content)
    _check_known(report.functions, known)
    return report


def parse_usage_report(content: bytes) -> UsageReport:
    """Return a usage report; raises RequestRejected."""
    return _parse(UsageReport.from_json, content)


def parse_router_report(content: bytes, *, now: float) -> list[RouterMemory]:
    """Return the state of a machine's routers.

    Args:
        content: body of the request.
        now: current time on the controllers' clock.

    Raises:
        RequestRejected: the body is invalid.
    """
    reports = _parse(RouterReport.list_from_json, content)
    return [
        RouterMemory(
            report.name,
            report.size_bytes,
            now - report.idle_s,
            is_running=report.is_running,
            is_wanted=report.is_wanted,
            is_pinned=report.is_pinned,
            is_ready=report.is_ready,
            waiting_since=now - report.waiting_s,
        )
        for report in reports
    ]


def parse_model_name(content: bytes) -> str:
    """Return the name of a model; raises RequestRejected."""

    def read(value: object) -> str:
        reader = ObjectReader(value, known=("model",))
        return reader.text("model", pattern=_MODEL_NAME, expected="the name of a model")

    return _parse(read, content)


def parse_activation_request(content: bytes, *, known: Container[str]) -> tuple[str, ...]:
    """Return the ids of the functions to activate; see `parse_load_report`."""
    request = _parse(ActivationRequest.from_json, content)
    _check_known(request.functions, known)
    return request.functions


def _parse(from_json: Callable[[object], Message], content: bytes) -> Message:
    try:
        return from_json(parse_json(content, field="body"))
    except ContractError as error:
        raise _reject(error) from error


def _check_known(names: Iterable[str], known: Container[str]) -> None:
    for name in names:
        if name not in known:
            raise invalid_field("functions", name, "a function of this model")


def _reject(error: ContractError) -> RequestRejected:
    return RequestRejected(str(error), status=422, code="invalid", field=error.field)
