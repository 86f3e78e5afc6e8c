"""`faasmoe up` with several models, or with Tenants: one gateway in front of all of them.

A single MoEModel, or MODEL, is served by `up.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from faasmoe_contracts.atomic_file import write_atomically
from faasmoe_contracts.store import Store
from faasmoe_contracts.tenant_usage import USAGE_FILE_NAME as FIRST
from faasmoe_contracts.tenant_usage import dump_usage, read_usage, usage_file, usage_files
from faasmoe_operator.aio import gather_limited
from faasmoe_operator.api.v1alpha1 import MoEModel
from faasmoe_operator.api.v1alpha1.documents import load_documents
from faasmoe_operator.api.v1alpha1.validation import process_platform_warnings
from faasmoe_operator.cli import control, live_page, model_arguments, router, tracing, up
from faasmoe_operator.cli.deployment import Deployment
from faasmoe_operator.cli.device_check import check_devices
from faasmoe_operator.cli.formatting import format_bytes, format_table
from faasmoe_operator.cli.live_page import LivePageOptions
from faasmoe_operator.cli.local_stack import ClientAccess, SharedControl, StackSpec
from faasmoe_operator.cli.logs import LogSinks, print_progress
from faasmoe_operator.cli.memory_merging import merge_equal_pages
from faasmoe_operator.cli.model_arguments import RequestedModel
from faasmoe_operator.cli.runtime_dir import locked_state, private_runtime_dir, register_instance
from faasmoe_operator.cli.shared_stack import (
    SharedProcesses,
    SharedSpec,
    check_memory,
    max_model_len,
    router_model,
    running_shared_stack,
    wait_until_healthy,
    with_api_keys,
)
from faasmoe_operator.cli.signals import run_until_signal
from faasmoe_operator.cli.store_preparation import prepare_store, verify_store
from faasmoe_operator.errors import CommandError
from faasmoe_operator.platforms.memory import pss_bytes


def add_commands(commands: Any) -> None:
    """Add `faasmoe up`."""
    up.add_command(commands).set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Serve one model or several until a signal arrives or a process fails."""
    if arguments.merge_memory:
        merge_equal_pages()
    needs_several = [
        option
        for option, is_given in (
            ("--memory", arguments.memory is not None),
            ("--gateways", arguments.gateways > 1),
        )
        if is_given
    ]
    if len(arguments.files) <= 1 and not _holds_several(arguments.files) and not needs_several:
        return up.run(arguments)
    if not arguments.files:
        raise CommandError(f"{needs_several[0]}: got MODEL, expected -f FILE", exit_status=2)
    if arguments.model is not None:
        raise CommandError(
            f"expected MODEL or -f FILE, got MODEL {arguments.model!r} and -f", exit_status=2
        )
    _check_options(arguments)
    deployment = Deployment.load(arguments.files)
    access = ClientAccess(tuple(arguments.api_key), tuple(arguments.cors_origin))
    for local in deployment.models.values():
        access.check(local)
        for warning in process_platform_warnings(local.model):
            print_progress(f"{local.model.metadata.name}: {warning}")
    if access.api_keys and deployment.tenants:
        raise CommandError("--api-key: there are tenants, which have keys", exit_status=2)
    for warning in deployment.warnings():
        print_progress(warning)
    trace_variables = {
        name: tracing.tracing_variables(arguments, local.model.spec.tracing)
        for name, local in deployment.models.items()
    }
    page = live_page.live_page_options(arguments)
    endpoint = router.Endpoint(arguments.host, arguments.port)
    endpoint.check_free()
    with LogSinks(arguments.log_dir) as logs, ExitStack() as locks:
        for local in deployment.models.values():
            locks.enter_context(locked_state(local.state_path))
        locks.enter_context(locked_state(deployment.state_path))
        return asyncio.run(
            run_until_signal(
                _prepare_and_serve(
                    deployment,
                    endpoint,
                    access,
                    logs,
                    keep_alive_s=arguments.keep_alive,
                    memory_bytes=arguments.memory,
                    page=page,
                    n_gateways=arguments.gateways,
                    separate_sandboxes=arguments.separate_sandboxes,
                    skip_verify=arguments.skip_verify,
                    trace_variables=trace_variables,
                )
            )
        )


def _holds_several(files: list[Path]) -> bool:
    """Return whether -f needs the gateway of several models; what is wrong with one, `up` says.

    That is so for several objects, and for a model whose router ends while nobody uses it.
    """
    if not files:
        return False
    if files[0].is_dir():
        return True
    if not files[0].is_file():
        return False
    documents = load_documents(files[0])
    if len(documents) != 1 or not isinstance(documents[0], MoEModel):
        return True
    return documents[0].spec.router.scaling is not None


def _check_options(arguments: argparse.Namespace) -> None:
    options = model_arguments.given_options(arguments)
    if not arguments.gateway:
        options.append("--no-gateway")
    if options:
        raise CommandError(
            f"{options[0]}: got it with several models or tenants, expected the fields of each "
            "MoEModel in its file",
            exit_status=2,
        )


async def _prepare_and_serve(
    deployment: Deployment,
    endpoint: router.Endpoint,
    access: ClientAccess,
    logs: LogSinks,
    *,
    keep_alive_s: float | None,
    memory_bytes: int | None,
    page: LivePageOptions | None,
    n_gateways: int,
    separate_sandboxes: bool,
    skip_verify: bool,
    trace_variables: Mapping[str, Mapping[str, str]],
) -> int:
    stores, unverified = {}, []
    for name, local in deployment.models.items():
        await check_devices(local)
        is_prepared = local.is_prepared
        others = [m.store_path for m in deployment.models.values() if m.is_prepared]
        if not is_prepared and (
            status := await prepare_store(RequestedModel(local, None), share_with=others)
        ):
            return status  # the preparation has said why
        store = stores[name] = local.open_store()
        local.functions(store.manifest, key=secrets.token_bytes(32))
        if is_prepared and not skip_verify:
            unverified.append(store)
    merge_usage(deployment.state_path)
    with private_runtime_dir() as folder, closing(control.ReservedControlPort.reserve()) as port:
        shared = SharedControl(folder, port, secrets.token_urlsafe(32))
        with _model_specs(deployment, endpoint, shared, trace_variables) as specs:
            spec = SharedSpec(
                with_api_keys(deployment, access, folder),
                specs,
                {n: max_model_len(deployment.models[n], s.manifest) for n, s in stores.items()},
                endpoint,
                access,
                shared,
                keep_alive_s,
                memory_bytes,
                page,
                n_gateways,
                separate_sandboxes,
            )
            check_memory(spec)
            print_progress(f"starting {len(specs)} models and a gateway")
            async with running_shared_stack(spec, logs) as processes:
                return await _serve(spec, processes, unverified)


def merge_usage(folder: Path) -> None:
    """Add the usage that further gateways of an earlier run have kept to the first one's.

    Raises:
        CommandError: a file cannot be read or written.
    """
    first, further = usage_file(folder, 0), [f for f in usage_files(folder) if f.name != FIRST]
    if not further:
        return
    try:
        usages, currencies = read_usage(usage_files(folder))
        write_atomically(first, dump_usage(usages, currencies), 0o600)
        for file in further:
            file.unlink()
    except (OSError, ValueError) as error:
        raise CommandError(f"{folder}: tenants' usage: {error}") from error


@contextmanager
def _model_specs(
    deployment: Deployment,
    endpoint: router.Endpoint,
    shared: SharedControl,
    trace_variables: Mapping[str, Mapping[str, str]],
) -> Iterator[Mapping[str, StackSpec]]:
    """Give each model its own folder and secret, and an entry by which other commands find it."""
    with ExitStack() as stack:
        specs = {}
        for name, local in deployment.models.items():
            folder = stack.enter_context(private_runtime_dir())
            specs[name] = StackSpec.of_several(
                router_model(local),
                endpoint,
                folder=folder,
                shared=shared,
                trace_variables=trace_variables[name],
            )
            register_instance(specs[name].instance, folder)
        yield specs


async def _serve(spec: SharedSpec, processes: SharedProcesses, unverified: list[Store]) -> int:
    """Serve until a process fails or a signal cancels this task, after the start with status 0."""
    task, serving = asyncio.current_task(), asyncio.Event()
    assert task is not None
    try:
        await up.run_until_failure(
            processes.failures, _announce(spec, processes, serving, unverified)
        )
        await up.run_until_failure(processes.failures, up.wait_forever())
    except asyncio.CancelledError:
        if not serving.is_set():
            raise
        task.uncancel()
    finally:
        print_progress("shutting down")
    return 0


async def _announce(
    spec: SharedSpec, processes: SharedProcesses, serving: asyncio.Event, unverified: list[Store]
) -> None:
    """Print the summary once all processes are healthy and all stores are verified."""

    async def verify() -> None:
        for store in unverified:
            await verify_store(store)

    steps = [
        verify,
        *(lambda n=name: wait_until_healthy(spec, processes, n) for name in spec.specs),
    ]
    await gather_limited(steps, lambda step: step(), limit=len(steps))
    serving.set()  # before printing: a reader of the summary may send a signal immediately
    print(format_summary(spec, processes), flush=True)


def format_summary(spec: SharedSpec, processes: SharedProcesses) -> str:
    """Return endpoints, models, tenants and memory (PSS) of the processes as text."""
    url, deployment = spec.endpoint.url, spec.deployment
    sizes = {name: pss_bytes(pid) if pid else None for name, pid in processes.pids.items()}
    rows = [
        (name, str(processes.pids[name] or "-"), format_bytes(size)) for name, size in sizes.items()
    ]
    models = [local.served_model_name for local in deployment.models.values()]
    return "\n".join(
        [
            f"{len(models)} models are served",
            "",
            f"  OpenAI base URL  {url}/v1",
            *([f"  live page        {url}{live_page.PAGE_PATH}"] if spec.live_page else []),
            f"  functions        {spec.shared.port.url}/metrics",
            *(f"  tenant           {t.name}: {url}/{t.name}/v1" for t in deployment.tenants),
            *(f"  model            {name}" for name in models),
            "",
            format_table(up.PROCESS_HEADER, rows),
        ]
    )
