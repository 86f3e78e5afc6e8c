"""`faasmoe explain`: why a running model is not ready, and why it is slow."""

from __future__ import annotations

import argparse
import asyncio
import http
from typing import Any

from faasmoe_operator.cli import kubectl_plugin, running_models
from faasmoe_operator.cli.control import fetch_status
from faasmoe_operator.cli.diagnosis import parse_totals, render
from faasmoe_operator.cli.runtime_dir import LocalInstance
from faasmoe_operator.errors import CommandError

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
    try:
        exposition = await _fetch_metrics(instance.metrics_url, api_key)
    except CommandError as error:
        return render(instance.name, status, None, note=str(error))
    return render(instance.name, status, parse_totals(exposition))


async def _fetch_metrics(url: str, api_key: str) -> str:
    """Return the router's metrics; raises CommandError."""
    import aiohttp

    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = aiohttp.ClientTimeout(total=METRICS_TIMEOUT_S)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.get(url, headers=headers) as response,
        ):
            if response.status == http.HTTPStatus.UNAUTHORIZED:
                raise CommandError(
                    f"{url} wants a key: --api-key or {running_models.KEY_VARIABLE}; "
                    "`router.metricsPort` needs none"
                )
            if response.status != http.HTTPStatus.OK:
                raise CommandError(f"{url}: got status {response.status}, expected 200")
            return await response.text()
    except TimeoutError as error:
        raise CommandError(f"{url}: no response in {METRICS_TIMEOUT_S:g} s") from error
    except aiohttp.ClientError as error:
        raise CommandError(f"{url}: {error}") from error
