"""`faasmoe explain`: why a running model is not ready, and why it is slow."""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

from faasmoe_operator.cli import kubectl_plugin, running_models
from faasmoe_operator.cli.control import fetch_status
from faasmoe_operator.cli.diagnosis import parse_totals, render
from faasmoe_operator.cli.runtime_dir import LocalInstance

METRICS_TIMEOUT_S = 5.0


def add_commands(commands: Any) -> None:
    """Add `faasmoe explain`."""
    parser = commands.add_parser(
        "explain",
        help="say why a running model is not ready, or slow",
        description="Say why a running model is not ready and why it is slow: which step takes\n"
        "the time, and what to change. Times are those since the router started.",
        epilog="Examples:\n"
        "  faasmoe explain\n"
        "  faasmoe explain qwen-moe\n"
        "  faasmoe explain qwen-moe -n models       # a MoEModel of the cluster",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    running_models.add_model(parser)
    running_models.add_api_key(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the explanation."""
    cluster = running_models.cluster_of(arguments)
    if cluster is not None:
        print(kubectl_plugin.explain(cluster, arguments.model))
        return 0
    instance = running_models.select_instance(arguments.model, arguments.file)
    print(asyncio.run(_explain(instance, running_models.api_key_of(arguments))))
    return 0


async def _explain(instance: LocalInstance, api_key: str) -> str:
    status = await fetch_status(instance.control_url, token=instance.token)
    if not instance.metrics_url:
        note = "several models share a gateway, which has no router's metrics"
        return render(instance.name, status, None, note=note)
    exposition = await _fetch_metrics(instance.metrics_url, api_key)
    if exposition is None:
        note = (
            f"{instance.metrics_url} wants a key: --api-key or {running_models.KEY_VARIABLE}; "
            "`router.metricsPort` needs none"
        )
        return render(instance.name, status, None, note=note)
    return render(instance.name, status, parse_totals(exposition))


async def _fetch_metrics(url: str, api_key: str) -> str | None:
    """Return the router's metrics; None if it does not answer."""
    import aiohttp

    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = aiohttp.ClientTimeout(total=METRICS_TIMEOUT_S)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout) as http,
            http.get(url, headers=headers) as response,
        ):
            return await response.text() if response.status == 200 else None
    except (aiohttp.ClientError, TimeoutError):
        return None
