"""The calibration file: what one machine was measured to need, in the simulator's units.

`faasmoe simulate --calibrate` writes it. The default is one that was measured with the demo model;
its machine and date are in the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from benchmarks.simulation.errors import SimulationError

DEFAULT_FILE = Path(__file__).with_name("calibration.json")


@dataclass(frozen=True, slots=True)
class Calibration:
    """Measured costs; all are finite and 0 or more, rates and factors above 0.

    Attributes:
        step_s: one step of the engine beyond weights, products and calls.
        call_s: one layer's call to its functions beyond their weights and products.
        read_bytes_per_s: rate at which weights are read when they are multiplied.
        flops_per_s: rate of products of many rows.
        request_s: one request from the client to the engine and its first token back.
        control_s: from a request at zero to the first attach, and from the last one to the engine.
        attach_s: one attach beyond reading its weights; one after the other for a model.
        weights_bytes_per_s: rate at which a node reads weights that it does not hold yet.
        sandbox_start_s: from creating a sandbox until it is ready.
        router_start_s: from starting a router until it is ready, beyond reading its weights.
        system_bytes: memory of gateway, control process and launcher.
        router_bytes: memory of a router beyond its weights and KV cache.
        runtime_bytes: memory that the sandboxes of one node share.
        sandbox_bytes: memory that each sandbox adds.
        attached_factor: memory of attached functions over the size of their weights.
        machine: the machine, for reports.
    """

    step_s: float
    call_s: float
    read_bytes_per_s: float
    flops_per_s: float
    request_s: float
    control_s: float
    attach_s: float
    weights_bytes_per_s: float
    sandbox_start_s: float
    router_start_s: float
    system_bytes: float
    router_bytes: float
    runtime_bytes: float
    sandbox_bytes: float
    attached_factor: float = 1.0
    machine: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        """Raise SimulationError for a number that is out of bounds."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "machine":
                continue
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            is_rate = field.name.endswith(("_per_s", "_factor"))
            if not is_number or not math.isfinite(value) or value < 0 or (is_rate and value == 0):
                expected = f"a number {'above 0' if is_rate else 'of 0 or more'}"
                raise SimulationError(f"calibration {field.name}", got=value, expected=expected)

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read a calibration file; raises SimulationError."""
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            expected = "a file written by `faasmoe simulate --calibrate`"
            raise SimulationError("--calibration", got=str(path), expected=expected) from error
        names = {field.name for field in fields(cls)}
        required = names - {"machine", "attached_factor"}
        if not isinstance(value, dict) or set(value) - names or required - set(value):
            got = sorted(value) if isinstance(value, dict) else type(value).__name__
            expected = f"the fields {', '.join(sorted(names))}"
            raise SimulationError("--calibration", got=got, expected=expected)
        return cls(**value)

    def to_json(self) -> dict[str, Any]:
        """Return the content of the calibration file."""
        return asdict(self)

    def save(self, path: Path) -> None:
        """Write the calibration file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")

    def scaled(self, *, speed: float, weights_bytes_per_s: float | None) -> Calibration:
        """Return the calibration of nodes of another speed.

        Args:
            speed: factor on the rates of weights and products.
            weights_bytes_per_s: rate at which a node reads weights; None for the measured one.
        """
        return replace(
            self,
            read_bytes_per_s=self.read_bytes_per_s * speed,
            flops_per_s=self.flops_per_s * speed,
            weights_bytes_per_s=weights_bytes_per_s or self.weights_bytes_per_s,
        )
