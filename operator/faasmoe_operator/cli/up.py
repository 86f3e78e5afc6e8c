"""`faasmoe up`: serves a MODEL or a MoEModel file with processes on this machine, until a signal.

What can fail because of user input (the model, the port, devices, the store's manifest and sizes)
is checked before the first process starts, so that errors appear as one message and not in a
child's log. The store's checksums are verified while the processes start.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import secrets
from collections.abc import Collection, Coroutine, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Never

from faasmoe_contracts.store import Store
from faasmoe_kernels import describe_cpu_kernels
from faasmoe_operator.aio import gather_limited
from faasmoe_operator.api.v1alpha1.field_types import quantity_to_bytes
from faasmoe_operator.api.v1alpha1.patterns import CORS_ORIGIN, DESCRIPTIONS
from faasmoe_operator.api.v1alpha1.validation import process_platform_warnings
from faasmoe_operator.cli import (
    control,
    live_page,
    model_arguments,
    router,
    tracing,
)
from faasmoe_operator.cli.device_check import check_devices
from faasmoe_operator.cli.formatting import format_bytes, format_table
from faasmoe_operator.cli.local_stack import ClientAccess, StackProcesses, StackSpec, running_stack
from faasmoe_operator.cli.logs import (
    LogSinks,
    print_progress,
    step_progress,
)
from faasmoe_operator.cli.model_arguments import RequestedModel
from faasmoe_operator.cli.runtime_dir import locked_state, private_runtime_dir, register_instance
from faasmoe_operator.cli.signals import run_until_signal
from faasmoe_operator.cli.store_preparation import prepare_store, verify_store
from faasmoe_operator.platforms.memory import pss_bytes

MAX_GATEWAYS = 64
START_STEPS = CONTROL_STEP, ROUTER_STEP = ("control process", "router")
PROCESS_HEADER = ("PROCESS", "PID", "MEMORY")


def add_command(commands: Any) -> argparse.ArgumentParser:
    """Add `faasmoe up` and return its parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "up",
        help="serve models on this machine",
        usage="faasmoe up (MODEL | -f FILE [-f FILE ...]) [options]",
        description="Serve Mixture-of-Experts models on this machine until Ctrl-C.\n"
        "The first start downloads the checkpoint, if it is on the hub, and prepares its store;\n"
        "later ones use the store again.",
        epilog="Examples:\n"
        "  faasmoe up Qwen/Qwen1.5-MoE-A2.7B-Chat\n"
        "  faasmoe up ./checkpoint --quantization int8 --max-model-len 8192 --port 9000\n"
        "  faasmoe up ./model-Q8_0.gguf --served-model-name chat --api-key s3cret\n"
        "  faasmoe up Qwen/Qwen3-30B-A3B-GGUF:Q8_0\n"
        "  faasmoe up -f model.yaml\n"
        "  faasmoe up -f chat.yaml -f code.yaml -f tenants.yaml\n\n"
        "Then, from another terminal:\n"
        "  curl http://127.0.0.1:8000/v1/models\n"
        "  faasmoe top\n\n"
        "The store of a MODEL is kept in $XDG_CACHE_HOME/faasmoe/stores (~/.cache by default) and\n"
        "may be removed when nothing serves it. With one MoEModel file, options override it.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    model_arguments.add_models(parser)
    _add_server_options(parser.add_argument_group("server"))
    model_arguments.add_store_options(parser.add_argument_group("weights"))
    functions = parser.add_argument_group("functions")
    model_arguments.add_granularity(functions)
    live_page.add_options(parser.add_argument_group("live page"))
    tracing.add_options(parser.add_argument_group("traces"))
    _add_process_options(parser.add_argument_group("processes"))
    parser.set_defaults(run=run)
    return parser


def _add_server_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: %(default)s)"
    )
    group.add_argument(
        "--port", type=_port, default=8000, help="port to listen on (default: %(default)s)"
    )
    group.add_argument(
        "--served-model-name",
        metavar="NAME",
        help="name of the model in requests (default: ORG/NAME, or that of the folder or file)",
    )
    group.add_argument(
        "--max-model-len",
        type=int,
        metavar="N",
        help="tokens of a prompt and its completion (default: the model's context)",
    )
    group.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help="require this API key; repeat it for several (for limits per key, use tenants)",
    )
    group.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        type=_origin,
        metavar="ORIGIN",
        help="let web pages of this origin call the API, such as https://chat.example.com or '*'; "
        "repeat it for several",
    )
    group.add_argument(
        "--keep-alive",
        type=_keep_alive_seconds,
        metavar="SECONDS",
        help="how long unused connections of clients are kept; more than a load balancer keeps "
        "them (default: spec.router.keepAliveSeconds, or 75)",
    )
    group.add_argument(
        "--gateway",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let clients talk to a process of their own that keeps their requests and streams "
        "while the router is restarted (default: %(default)s)",
    )


def _add_process_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--memory",
        type=_memory_bytes,
        metavar="SIZE",
        help="memory of all functions and routers together, such as 6Gi; what was used least "
        "recently makes room (with -f; routers end with router.scaling alone)",
    )
    group.add_argument(
        "--merge-memory",
        action="store_true",
        help="have the kernel keep equal memory pages of all processes once, where the machine's "
        "administrator has switched that on (KSM; Linux 6.7)",
    )
    group.add_argument(
        "--separate-sandboxes",
        action="store_true",
        help="give each of several models sandboxes of its own; by default, a sandbox holds "
        "functions of several models",
    )
    group.add_argument(
        "--gateways",
        type=_gateway_count,
        default=1,
        metavar="N",
        help="gateways that accept clients together, within the same limits and budgets "
        "(default: %(default)s; more with -f)",
    )
    group.add_argument(
        "--log-dir",
        type=Path,
        metavar="DIR",
        help="write one log file per process to DIR instead of printing to the terminal",
    )
    group.add_argument(
        "--skip-verify", action="store_true", help="do not verify the checksums of the store"
    )


def _origin(text: str) -> str:
    if not re.fullmatch(CORS_ORIGIN, text):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected {DESCRIPTIONS[CORS_ORIGIN]}")
    return text


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected 1 to 65535")
    return int(text)


def _memory_bytes(text: str) -> int:
    try:
        size_bytes = quantity_to_bytes(text)
    except ValueError:
        size_bytes = 0
    if size_bytes < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a size such as 6Gi")
    return size_bytes


def _gateway_count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MAX_GATEWAYS:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected 1 to {MAX_GATEWAYS}")
    return int(text)


def _keep_alive_seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected 1 to 3600 seconds")
    return seconds


def run(arguments: argparse.Namespace) -> int:
    """Serve the model until a signal arrives or a process fails."""
    requested = model_arguments.load_model(arguments)
    deployment = requested.deployment
    deployment.check_api_keys()
    for warning in process_platform_warnings(deployment.model):
        print_progress(warning)
    access = ClientAccess(tuple(arguments.api_key), tuple(arguments.cors_origin))
    access.check(deployment)
    page = live_page.live_page_options(arguments)
    trace_variables = tracing.tracing_variables(arguments, deployment.model.spec.tracing)
    endpoint = router.Endpoint(arguments.host, arguments.port)
    endpoint.check_free()
    if requested.cached is not None:
        requested.cached.make_parent()
    with LogSinks(arguments.log_dir) as logs, locked_state(deployment.state_path):
        return asyncio.run(
            run_until_signal(
                _prepare_and_serve(
                    requested,
                    endpoint,
                    access,
                    logs,
                    skip_verify=arguments.skip_verify,
                    keep_alive_s=arguments.keep_alive,
                    has_gateway=arguments.gateway,
                    page=page,
                    trace_variables=trace_variables,
                )
            )
        )


async def _prepare_and_serve(
    requested: RequestedModel,
    endpoint: router.Endpoint,
    access: ClientAccess,
    logs: LogSinks,
    *,
    skip_verify: bool,
    keep_alive_s: float | None,
    has_gateway: bool,
    page: live_page.LivePageOptions | None,
    trace_variables: Mapping[str, str],
) -> int:
    deployment = requested.deployment
    await check_devices(deployment)
    if requested.is_prepared:
        print_progress(f"store: {deployment.store_path}")
    else:
        shared = [] if requested.cached is None else [requested.cached.path.parent]
        if status := await prepare_store(requested, share_with=shared):
            return status  # the preparation has said why
        skip_verify = True  # the checksums were computed just now
    store = deployment.open_store()
    deployment = requested.laid_out(store.manifest)
    # Raises MoEModelError here rather than in the log of the control process.
    deployment.functions(store.manifest, key=secrets.token_bytes(32))
    with private_runtime_dir() as folder, closing(control.ReservedControlPort.reserve()) as port:
        spec = StackSpec.create(
            deployment,
            endpoint,
            access=access,
            folder=folder,
            port=port,
            keep_alive_s=keep_alive_s,
            has_gateway=has_gateway,
            live_page=page,
            trace_variables=trace_variables,
        )
        register_instance(spec.instance, folder)
        print_progress(f"CPU kernels: {describe_cpu_kernels()}")
        print_progress("starting zygote, control process and router")
        async with running_stack(spec, logs) as processes:
            return await _serve(spec, processes, unverified=None if skip_verify else store)


async def _serve(
    spec: StackSpec,
    processes: StackProcesses,
    *,
    unverified: Store | None,
) -> int:
    """Serve until a process fails or a signal cancels this task; verify the store meanwhile.

    A signal after startup is a normal exit with status 0; during startup the cancellation
    propagates.
    """
    task, serving = asyncio.current_task(), asyncio.Event()
    assert task is not None
    try:
        await run_until_failure(
            processes.failures, _announce(spec, processes, serving, unverified=unverified)
        )
        await run_until_failure(processes.failures, wait_forever())
    except asyncio.CancelledError:
        if not serving.is_set():
            raise
        task.uncancel()
    finally:
        print_progress("shutting down")
    return 0


async def _announce(
    spec: StackSpec,
    processes: StackProcesses,
    serving: asyncio.Event,
    *,
    unverified: Store | None,
) -> None:
    """Print the summary once all processes are healthy and the store is verified."""
    steps = [lambda: _wait_until_healthy(spec, processes)]
    if unverified is not None:
        steps.insert(0, lambda: verify_store(unverified))
    await gather_limited(steps, lambda step: step(), limit=len(steps))
    await _print_summary(spec, processes, serving)


async def _wait_until_healthy(spec: StackSpec, processes: StackProcesses) -> None:
    with step_progress("starting", START_STEPS) as done:
        await control.wait_until_healthy(spec.port.url)
        done(CONTROL_STEP)
        await router.wait_until_healthy(spec.endpoint, progress=print_progress)
        done(ROUTER_STEP)
    processes.router.has_started = True


async def _print_summary(
    spec: StackSpec, processes: StackProcesses, serving: asyncio.Event
) -> None:
    url = spec.port.url
    status = await control.fetch_status(url, token=spec.secrets.token)
    text = format_summary(
        status,
        url=spec.endpoint.url,
        control_url=url,
        pids=processes.pids,
        tenants=[tenant.name for tenant in spec.deployment.model.spec.tenants],
        served_model_name=spec.deployment.served_model_name,
        has_live_page=spec.live_page is not None,
    )
    serving.set()  # before printing: a reader of the summary may send a signal immediately
    print(text, flush=True)


def format_summary(
    status: Mapping[str, Any],
    *,
    url: str,
    control_url: str,
    pids: Mapping[str, int | None],
    tenants: Sequence[str] = (),
    served_model_name: str | None = None,
    has_live_page: bool = False,
) -> str:
    """Return endpoints and memory (PSS) of the running processes as text.

    Args:
        status: the response to GET /v1/status.
        url: base URL of the router.
        control_url: base URL of the control API.
        pids: process ids of all processes except sandboxes, by name.
        tenants: names of the tenants; empty if the model is open to everyone.
        served_model_name: the name that requests give; None for the model's own.
        has_live_page: whether the live page is served.
    """
    functions, sandboxes = status["functions"], status["sandboxes"]
    n_active = sum(function["ready"] > 0 for function in functions)
    sizes = {name: pss_bytes(pid) if pid else None for name, pid in pids.items()}
    sandbox_bytes = sum(sandbox["pss_bytes"] or 0 for sandbox in sandboxes)
    rows = [(name, str(pids[name] or "-"), format_bytes(size)) for name, size in sizes.items()]
    rows.append((f"{len(sandboxes)} sandboxes", "-", format_bytes(sandbox_bytes)))
    total = sum(size or 0 for size in sizes.values()) + sandbox_bytes
    return "\n".join(
        [
            f"{status['model']} is served by {len(functions)} functions, {n_active} of them "
            f"active, in {len(sandboxes)} sandboxes",
            "",
            f"  OpenAI base URL  {url}/v1",
            *(f"  tenant           {name}: {url}/{name}/v1" for name in tenants),
            f"  model            {served_model_name or status['model']}",
            f"  control          {control_url}  (faasmoe top)",
            *([f"  live page        {url}{live_page.PAGE_PATH}"] if has_live_page else []),
            "",
            format_table(PROCESS_HEADER, rows),
            f"memory of all processes, shared pages counted once: {format_bytes(total)}",
        ]
    )


async def run_until_failure(
    failures: Collection[asyncio.Task[Never]], coroutine: Coroutine[Any, Any, None]
) -> None:
    """Run a coroutine to completion, or cancel it and raise once a process has failed."""
    task = asyncio.create_task(coroutine)
    try:
        await asyncio.wait([task, *failures], return_when=asyncio.FIRST_COMPLETED)
        for finished in [*failures, task]:
            if finished.done():
                await finished
                return
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def wait_forever() -> None:
    """Wait until this task is cancelled."""
    await asyncio.Event().wait()
