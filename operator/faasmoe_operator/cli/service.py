"""What `faasmoe up` tells its user once the model is served."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from faasmoe_operator.cli.memory import format_bytes
from faasmoe_operator.cli.table import format_table
from faasmoe_operator.platforms.memory import pss_bytes

HEADER = ("PROCESS", "PID", "MEMORY")


def describe(
    status: Mapping[str, Any],
    *,
    url: str,
    control_url: str,
    pids: Mapping[str, int | None],
    tenants: Sequence[str] = (),
) -> str:
    """Return endpoints and memory as text; memory is what each process has touched (PSS).

    Args:
        status: what the control says.
        url: the router's address.
        control_url: the control API's address.
        pids: the processes that are no sandboxes, by name.
        tenants: names of those who may use the model; none if it is open.
    """
    functions, sandboxes = status["functions"], status["sandboxes"]
    n_up = sum(function["ready"] > 0 for function in functions)
    sizes = {name: pss_bytes(pid) if pid else None for name, pid in pids.items()}
    sandbox_bytes = sum(sandbox["pss_bytes"] or 0 for sandbox in sandboxes)
    rows = [(name, str(pids[name] or "-"), format_bytes(size)) for name, size in sizes.items()]
    rows.append((f"{len(sandboxes)} sandboxes", "-", format_bytes(sandbox_bytes)))
    total = sum(size or 0 for size in sizes.values()) + sandbox_bytes
    return "\n".join(
        [
            f"{status['model']} is served by {len(functions)} functions, {n_up} of them up now, "
            f"in {len(sandboxes)} sandboxes",
            "",
            f"  OpenAI base URL  {url}/v1",
            *(f"  tenant           {name}: {url}/{name}/v1" for name in tenants),
            f"  model            {status['model']}",
            f"  control          {control_url}  (faasmoe top)",
            "",
            format_table(HEADER, rows),
            f"memory of all processes, pages shared counted once: {format_bytes(total)}",
        ]
    )
