"""A model's activity as the JSON object that the live page draws."""

from __future__ import annotations

import time
from typing import Any

from faasmoe_operator.control.controller import Controller
from faasmoe_operator.control.live.shown_functions import MAX_LEVEL, ShownFunction

MAX_CELLS = 20_000
MAX_TENANTS = 100
_NOTHING_SHOWN = ShownFunction()


def live_view(controller: Controller, *, with_tenants: bool) -> dict[str, Any]:
    """Return what is shown of a controller's model; times are Unix seconds.

    Args:
        controller: the model's.
        with_tenants: whether the viewer may see what each tenant uses.
    """
    now, activity = controller.clock(), controller.activity
    to_unix_s = time.time() - now
    window = activity.window
    return {
        "model": controller.model.name,
        "functions": {
            "active": activity.n_active,
            "total": len(controller.model.functions),
            "max_level": MAX_LEVEL,
            "cells": _cells(controller),
            "shown_at": None if window.shown_at is None else window.shown_at + to_unix_s,
            "min_tokens": window.settings.min_tokens,
        },
        "memory": {
            "active_bytes": activity.memory.active_bytes,
            "all_bytes": activity.all_bytes,
            "active_gb_s": activity.memory.active_gb_seconds(now),
            "resident_gb_s": activity.memory.resident_gb_seconds(now),
        },
        "sandboxes": [
            {
                "id": record.sandbox.id,
                "state": record.state.value,
                "functions": len(record.functions),
                "node": record.sandbox.node,
            }
            for record in controller.fleet.sandboxes
        ],
        "routers": controller.routing_table.n_watchers,
        "queued": controller.load_reports.queued(now),
        "failure": controller.failure,
        "events": [
            {
                "kind": event.kind.value,
                "at": event.at + to_unix_s,
                "count": event.count,
                "longest_s": event.longest_s,
            }
            for event in activity.timeline
        ],
        "tenants": _tenants(controller) if with_tenants else None,
    }


def _tenants(controller: Controller) -> list[dict[str, Any]]:
    """Return the use of the `MAX_TENANTS` with the most GB-seconds of functions, these first."""
    usage = controller.usage_ledger.usage_by_tenant.items()
    most = sorted(usage, key=lambda item: -item[1].expert_gb_seconds)[:MAX_TENANTS]
    return [
        {
            "name": name,
            "requests": used.completed,
            "prompt_tokens": used.prompt_tokens,
            "generated_tokens": used.generated_tokens,
            "gb_s": used.expert_gb_seconds,
        }
        for name, used in most
    ]


def _cells(controller: Controller) -> list[tuple[int, int, int, int, int]]:
    """Return (layer, block, level, replicas, desired) of the first `MAX_CELLS` functions.

    A block is a function's position among those of its first layer.
    """
    cells, next_block = [], dict[int, int]()
    for name, function in controller.model.functions.items():
        layer = function.spec.layers[0]
        block = next_block.get(layer, 0)
        next_block[layer] = block + 1
        shown = controller.activity.window.shown.get(name, _NOTHING_SHOWN)
        cells.append((layer, block, shown.level, shown.replicas, shown.desired))
        if len(cells) == MAX_CELLS:
            break
    return cells
