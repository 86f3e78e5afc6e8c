"""What `faasmoe up` tells its user once the model is served."""

from __future__ import annotations

from dataclasses import dataclass

from faasmoe_expert.store import Store
from faasmoe_expert.table import FunctionSpec
from faasmoe_operator.cli.memory import format_bytes, pss_bytes
from faasmoe_operator.cli.table import format_table
from faasmoe_operator.control.residency import Residents
from faasmoe_operator.plan.functions import function_bytes
from faasmoe_operator.platforms.base import Sandbox

MAX_SANDBOXES_SHOWN = 32
HEADER = ("PROCESS", "PID", "FUNCTIONS", "WEIGHTS", "MEMORY", "PER FUNCTION")


@dataclass(frozen=True, slots=True)
class Service:
    """A model that is served.

    Attributes:
        name: its name in the API.
        url: the router's address.
        residents: the functions and their sandboxes.
        store: what they are attached from.
    """

    name: str
    url: str
    residents: Residents
    store: Store

    def describe(self, *, router_pid: int) -> str:
        """Return endpoints and memory as text; memory is what each process has touched (PSS)."""
        sandboxes = self.residents.sandboxes
        memory = {sandbox.id: pss_bytes(sandbox.pid or 0) for sandbox, _ in sandboxes}
        router_bytes = pss_bytes(router_pid)
        rows: list[tuple[str, ...]] = [
            ("router", str(router_pid), "-", "-", format_bytes(router_bytes), "-")
        ]
        rows += [
            self._row(sandbox, functions, memory[sandbox.id])
            for sandbox, functions in sandboxes[:MAX_SANDBOXES_SHOWN]
        ]
        if len(sandboxes) > MAX_SANDBOXES_SHOWN:
            left = f"and {len(sandboxes) - MAX_SANDBOXES_SHOWN} more"
            rows.append((left, "", "", "", "", ""))
        total = sum(size or 0 for size in [router_bytes, *memory.values()])
        return "\n".join(
            [
                f"{self.name} is served by {len(self.residents.functions)} functions "
                f"in {len(sandboxes)} sandboxes",
                "",
                f"  OpenAI base URL  {self.url}/v1",
                f"  model            {self.name}",
                "",
                format_table(HEADER, rows),
                f"memory of all processes, pages shared counted once: {format_bytes(total)}",
            ]
        )

    def _row(
        self, sandbox: Sandbox, functions: tuple[FunctionSpec, ...], size_bytes: int | None
    ) -> tuple[str, ...]:
        layers = self.store.manifest.layers
        weights = sum(function_bytes(function, layers) for function in functions)
        each = None if size_bytes is None else size_bytes / len(functions)
        return (
            sandbox.id,
            str(sandbox.pid or "-"),
            str(len(functions)),
            format_bytes(weights),
            format_bytes(size_bytes),
            format_bytes(each),
        )
