"""Errors of the simulator."""

from __future__ import annotations

from faasmoe_operator.errors import FaasmoeError


class SimulationError(FaasmoeError):
    """A trace, profile, calibration, geometry or option is invalid: names the field."""

    def __init__(self, field: str, *, got: object, expected: str) -> None:
        super().__init__(f"{field}: got {got!r}, expected {expected}")
