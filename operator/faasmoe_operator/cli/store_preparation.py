"""Preparing a model's store in a child process, and verifying its checksums."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from faasmoe_contracts.store import Store
from faasmoe_operator.cli import child_process
from faasmoe_operator.cli.checkpoint import prepare_command
from faasmoe_operator.cli.formatting import format_bytes
from faasmoe_operator.cli.logs import byte_progress, print_progress
from faasmoe_operator.cli.model_arguments import RequestedModel
from faasmoe_operator.errors import CommandError

PREPARE_GRACE_S = 10.0
VERIFICATION_NICENESS = 10


async def prepare_store(requested: RequestedModel, *, share_with: Sequence[Path] = ()) -> int:
    """Prepare the store; return the exit status of the preparation, which reports its errors.

    Args:
        requested: the model.
        share_with: stores, or folders of stores, to share files with.

    Raises:
        CommandError: a signal ended the preparation.
    """
    deployment, cached = requested.deployment, requested.cached
    source, path = deployment.source, deployment.store_path
    is_outdated = cached is not None and cached.is_outdated
    if is_outdated:
        print_progress(f"{source} has changed since its store was prepared")
    print_progress(f"preparing {source} in {path}")
    stamp = None if cached is None else cached.stamp()
    async with child_process.running_child(
        prepare_command(
            source,
            str(path),
            revision=deployment.model.spec.model.revision,
            dtype=deployment.dtype,
            quantization=deployment.quantization,
            mode=deployment.model.spec.store.mode or "auto",
            force=is_outdated,
            share_with=share_with,
        ),
        environment=os.environ,
        log=None,
        grace_s=PREPARE_GRACE_S,
    ) as preparation:
        status = await preparation.exit_status()
    if status < 0:
        raise CommandError(f"the preparation of {source} was ended by signal {-status}")
    if status == 0 and cached is not None:
        cached.write_stamp(stamp)
    return status


async def verify_store(store: Store) -> None:
    """Verify the store's checksums file by file, so that a signal waits for one file at most."""
    files = store.manifest.files
    total_bytes = sum(file.size_bytes for file in files.values())
    size = format_bytes(total_bytes)
    print_progress(f"verifying {len(files)} files of the store, {size} (skip with --skip-verify)")
    loop = asyncio.get_running_loop()
    executor = ThreadPoolExecutor(1, initializer=_lower_priority)
    try:
        with byte_progress("verifying", total_bytes=total_bytes) as advance:
            for name, file in files.items():
                await loop.run_in_executor(executor, store.verify, [name])
                advance(file.size_bytes)
    finally:
        executor.shutdown(wait=False)  # processes stop while a last file is read


def _lower_priority() -> None:
    """Let the processes that start have the cores first; applies to this thread alone."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), VERIFICATION_NICENESS)
