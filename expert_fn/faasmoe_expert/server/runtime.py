"""The functions attached to a sandbox: attach, detach, compute, and their metrics.

Knows nothing of HTTP. Reading and verifying a block takes tens of milliseconds from the page cache
and seconds from a disk, so `BackgroundLoader` (loader.py) does it in a thread, one function after
the other, while the event loop computes frames of other functions. Only the event loop changes the
set of attached functions.
"""

from __future__ import annotations

import os
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_contracts.store import MANIFEST_NAME, Store, StoreError
from faasmoe_contracts.text import short_repr
from faasmoe_contracts.tls import TlsFolder, TlsPeer, models_name
from faasmoe_contracts.wire import Buffer, ExpertRequest, WireError, decode_request, encode_response
from faasmoe_expert.blocks.cache import BlockCache
from faasmoe_expert.blocks.client import PeerClient
from faasmoe_expert.config import SandboxConfig
from faasmoe_expert.errors import (
    AttachRefused,
    BadAttachment,
    BadFrame,
    OutOfMemory,
    UnknownFunction,
)
from faasmoe_expert.functions import ExpertFunction
from faasmoe_expert.functions.function import function_size_bytes, request_batch_key
from faasmoe_expert.functions.native_kernel import describe_kernels
from faasmoe_expert.functions.transfer import Uploader, uploader_for
from faasmoe_expert.functions.verification import file_identity, process_verified_blocks
from faasmoe_expert.server.attachments import Attachment
from faasmoe_expert.server.mailboxes import MailboxServer
from faasmoe_expert.server.memory_budget import SandboxMemoryBudget, memory_budget_for
from faasmoe_expert.server.metrics import SandboxMetrics


@dataclass(frozen=True, slots=True)
class LoadedFunction:
    """A loaded function that is not attached yet.

    Attributes:
        function: the function.
        store: its opened store.
        store_path: the store's path as given in the attachment, or its folder in the cache.
        attached_from: the store's path as given in the attachment.
        load_s: time spent loading.
    """

    function: ExpertFunction
    store: Store
    store_path: Path
    attached_from: Path
    load_s: float


@dataclass(frozen=True, slots=True)
class ComputeTask:
    """A decoded frame and the function to compute it with."""

    function: ExpertFunction
    request: ExpertRequest

    @property
    def batch_key(self) -> Hashable:
        """Key that tasks must share to be computed in one batch."""
        return id(self.function), request_batch_key(self.request)


class SandboxRuntime:
    """Attaches, detaches and computes functions.

    Belongs to one thread, except for `load`.

    Args:
        config: settings of the sandbox.
        device: device to compute on.
        memory_budget: limit on the functions' memory; by default from the settings and the device.
        uploader: copies functions to the device; by default whichever the device needs.
        tls: certificate that store peers are shown; None for peers without TLS.

    Attributes:
        config: settings of the sandbox.
        device: device to compute on.
        metrics: metrics of the sandbox.
        mailboxes: computes frames of routers on this machine without Python; None for HTTP only.
    """

    def __init__(
        self,
        config: SandboxConfig,
        device: torch.device,
        *,
        memory_budget: SandboxMemoryBudget | None = None,
        uploader: Uploader | None = None,
        tls: TlsFolder | None = None,
    ) -> None:
        self.config = config
        self.device = device
        self.metrics = SandboxMetrics(min_tokens=config.metrics_min_tokens)
        self._functions: dict[str, ExpertFunction] = {}
        self._attached_from: dict[str, Path] = {}  # as the attachments said
        self._stores: dict[
            tuple[Path, str], Store
        ] = {}  # of attached functions, by path and digest
        self._memory_budget = memory_budget or memory_budget_for(device, config.memory_bytes)
        self._uploader = uploader or uploader_for(device)
        self._cache = _block_cache(config, tls)
        self.mailboxes = MailboxServer.create(config, device.type)
        if self.mailboxes is not None:
            self.metrics.include_mailboxes(self.mailboxes.counters)

    def list_functions(self, store: Path | None = None) -> dict[str, Any]:
        """Return the state of the sandbox and its functions, for the control plane to inspect.

        Args:
            store: lists the functions that were attached from it; None lists all.
        """
        listed = self._functions if store is None else self._functions_from(store)
        return {
            "sandbox": {
                "id": self.config.id,
                "pid": os.getpid(),
                "capacity": self.config.capacity,
                "device": str(self.device),
                "kernels": describe_kernels(self.device),
                "memory": {
                    "limit_bytes": self._memory_budget.limit_bytes(),
                    "used_bytes": self._memory_budget.used_bytes,
                },
            },
            "functions": [self._function_status(self._functions[name]) for name in listed],
        }

    def attach(
        self, spec: FunctionSpec, *, store: Path, model_digest: str
    ) -> tuple[dict[str, Any], bool]:
        """Attach a function; idempotent.

        Args:
            spec: id, layers and experts of the function.
            store: directory of the store.
            model_digest: expected digest of the store's manifest.

        Returns:
            Status of the function as in `list_functions`, and whether it is newly attached.

        Raises:
            AttachRefused: the sandbox is full, or the id is attached with other experts.
            BadAttachment: a field is invalid.
            BlockCorrupted: bytes of the store do not match their digest.
            OutOfMemory: allocation failed, or the memory budget is exceeded.
        """
        attached = self.find_attached(spec, model_digest)
        if attached is not None:
            return attached, False
        return self.add(self.load(spec, store=store, model_digest=model_digest)), True

    def find_attached(self, spec: FunctionSpec, model_digest: str) -> dict[str, Any] | None:
        """Return the status of a function if it is attached, None if it can be attached.

        Raises:
            AttachRefused: the sandbox is full, or the id is attached with other experts.
        """
        attached = self._functions.get(spec.id)
        if attached is not None and (attached.spec, attached.model_digest) == (spec, model_digest):
            return self._function_status(attached)
        self._check_capacity(spec, attached)
        return None

    @property
    def n_loadable(self) -> int:
        """Number of functions that can be loaded before the first of them is attached.

        One where functions are copied to a device: what that takes is known once it is done.
        """
        return 1 if self._uploader is not None else self.config.capacity - len(self._functions)

    def load_all(self, attachments: Sequence[Attachment]) -> list[LoadedFunction | Exception]:
        """Load functions one after the other; return what each is, or why it is refused.

        May run in another thread, as `load`.
        """
        loaded: list[LoadedFunction | Exception] = []
        loading_bytes = 0
        for attachment in attachments:
            try:
                function = self.load(
                    attachment.spec, **attachment.source, loading_bytes=loading_bytes
                )
            except Exception as error:
                loaded.append(error)
            else:
                loading_bytes += function.function.size_bytes
                loaded.append(function)
        return loaded

    def load(
        self, spec: FunctionSpec, *, store: Path, model_digest: str, loading_bytes: int = 0
    ) -> LoadedFunction:
        """Read and verify a function's block without attaching it.

        May run in another thread than the other methods, but not concurrently with itself.

        Args:
            spec: id, layers and experts of the function.
            store: directory of the store.
            model_digest: expected digest of the store's manifest.
            loading_bytes: size of functions that are loaded, but not attached yet.

        Raises:
            BadAttachment: a field is invalid.
            BlockCorrupted: bytes of the store do not match their digest.
            OutOfMemory: allocation failed, or the memory budget is exceeded.
            StoreUnavailable: the store is not at its path, and no block server served the block.
        """
        start_s, attached_from = time.perf_counter(), store
        store = self._fetched_store(spec, store, model_digest)
        try:
            with torch.no_grad():  # a per-thread setting
                opened = self._open_store(store, model_digest)
                is_copied = self._uploader is not None
                self._memory_budget.check_fits(
                    loading_bytes + function_size_bytes(spec, opened, is_dequantized=is_copied)
                )
                function = self._load_function(spec, opened)
        except BaseException:
            if self._cache is not None:
                self._cache.release(store)
            raise
        load_s = time.perf_counter() - start_s
        return LoadedFunction(function, opened, store, attached_from, load_s)

    def add(self, loaded: LoadedFunction) -> dict[str, Any]:
        """Attach a loaded function; return its status as in `list_functions`."""
        function = loaded.function
        self._memory_budget.add(function.size_bytes)
        self._functions[function.spec.id] = function
        self._attached_from[function.spec.id] = loaded.attached_from
        self._stores[loaded.store_path, function.model_digest] = loaded.store
        self.metrics.functions.attach_seconds.observe(loaded.load_s)
        self._update_gauges()
        if self.mailboxes is not None:
            self.mailboxes.publish(function)
        return self._function_status(function)

    def detach(self, function_id: str) -> None:
        """Detach a function and free its memory; raises UnknownFunction."""
        function = self._functions.pop(function_id, None)
        if function is None:
            raise _unknown_function(function_id)
        del self._attached_from[function_id]
        if self.mailboxes is not None:  # before its weights are unmapped
            self.mailboxes.retract(function_id)
        size_bytes, store_path = function.size_bytes, function.store_path
        del function
        self._memory_budget.release(size_bytes)
        self._release_store(store_path)
        self._update_gauges()

    def detach_all(self, store: Path) -> list[str]:
        """Detach every function that was attached from a store; return their ids."""
        detached = self._functions_from(store)
        for function_id in detached:
            self.detach(function_id)
        return detached

    def discard(self, loaded: LoadedFunction) -> None:
        """Give up a loaded function that is not attached after all."""
        store_path = loaded.store_path
        del loaded
        self._memory_budget.release()
        self._release_store(store_path)

    def parse_frame(self, function_id: str, frame: Buffer) -> ComputeTask:
        """Decode a frame and check it against its function.

        Raises:
            UnknownFunction: no such function is attached.
            BadFrame: the frame is malformed or does not match the function.
        """
        function = self._functions.get(function_id)
        if function is None:
            raise _unknown_function(function_id)
        try:
            request = decode_request(frame)
        except WireError as error:
            raise BadFrame(str(error), field=error.field) from error
        function.check_request(request)
        return ComputeTask(function, request)

    def compute_batch(self, tasks: Sequence[ComputeTask]) -> list[list[Buffer]]:
        """Compute tasks as one batch.

        Args:
            tasks: tasks with the same `batch_key`.

        Returns:
            The buffers of each task's response frame.

        Raises:
            BlockCorrupted: the store was modified and no longer matches its digests.
        """
        requests = [task.request for task in tasks]
        start_s = time.perf_counter()
        function = tasks[0].function
        try:
            outputs = function.compute_batch(requests)
        finally:
            if self.mailboxes is not None and function.spec.id in self._functions:
                self.mailboxes.refresh(function)
        self.metrics.count_batch(
            n_frames=len(tasks),
            n_rows=sum(r.header.n_rows for r in requests),
            seconds=time.perf_counter() - start_s,
        )
        return [
            encode_response(request.header, output.view(torch.uint8).numpy().data)
            for request, output in zip(requests, outputs, strict=True)
        ]

    def _functions_from(self, store: Path) -> list[str]:
        return [name for name, path in self._attached_from.items() if path == store]

    def _release_store(self, store_path: Path) -> None:
        """Close stores, and give up a folder of the cache, that no function needs any more."""
        used_keys = {(f.store_path, f.model_digest) for f in self._functions.values()}
        self._stores = {key: store for key, store in self._stores.items() if key in used_keys}
        if self._cache is not None and not any(path == store_path for path, _ in used_keys):
            self._cache.release(store_path)

    def _check_capacity(self, spec: FunctionSpec, attached: ExpertFunction | None) -> None:
        if attached is not None:
            raise AttachRefused(
                f"id: {spec.id} is attached with layers {short_repr(list(attached.spec.layers))} "
                f"and experts {short_repr(list(attached.spec.experts))} of "
                f"{attached.model_digest}, expected the same",
                field="id",
            )
        capacity = self.config.capacity
        if len(self._functions) >= capacity:
            raise AttachRefused(
                f"capacity: sandbox is full, expected at most {capacity} functions",
                field="capacity",
            )

    def _fetched_store(self, spec: FunctionSpec, path: Path, model_digest: str) -> Path:
        """Return the store's path, or a folder of the cache if there is no store at it."""
        if self._cache is None or (path / MANIFEST_NAME).exists():
            return path
        start_s = time.perf_counter()
        cached = self._cache.ensure(spec, model_digest)
        if cached.fetched:
            self.metrics.functions.fetch_seconds.observe(time.perf_counter() - start_s)
            self.metrics.functions.fetched_bytes.inc(cached.fetched_bytes)
        verified = process_verified_blocks()
        for block in cached.fetched:  # while it was written
            verified.add((file_identity(block.path),), block.block, block.digest)
        return cached.path

    def _load_function(self, spec: FunctionSpec, store: Store) -> ExpertFunction:
        try:
            return ExpertFunction(spec, store, uploader=self._uploader)
        except StoreError as error:
            raise BadAttachment(f"store: {error}", field="store") from error
        except torch.OutOfMemoryError as error:
            reason = short_repr(str(error))
        # Outside the handler, because the exception's traceback keeps the copies alive.
        self._memory_budget.release()
        raise OutOfMemory(f"memory: allocation failed ({reason})", field="memory")

    def _open_store(self, path: Path, model_digest: str) -> Store:
        try:
            store = self._stores.get((path, model_digest)) or Store.open(path)
        except StoreError as error:
            raise BadAttachment(f"store: {error}", field="store") from error
        if store.manifest.digest != model_digest:
            raise BadAttachment(
                f"model_digest: got {short_repr(model_digest)}, "
                f"expected {store.manifest.digest} of {path}",
                field="model_digest",
            )
        return store

    def _update_gauges(self) -> None:
        functions = self._functions.values()
        self.metrics.set_functions(
            (f.size_bytes for f in functions), n_layers=sum(len(f.spec.layers) for f in functions)
        )

    def _function_status(self, function: ExpertFunction) -> dict[str, Any]:
        n_native = self.mailboxes.function_frames(function.spec.id) if self.mailboxes else 0
        return {
            **function.spec.to_json(),
            "model_digest": function.model_digest,
            "store": str(self._attached_from[function.spec.id]),
            "size_bytes": function.size_bytes,
            "kernel": function.kernel_name,
            "frames": function.n_frames + n_native,
        }

    def close(self) -> None:
        """Close the mailboxes."""
        if self.mailboxes is not None:
            self.mailboxes.close()


def _block_cache(config: SandboxConfig, tls: TlsFolder | None) -> BlockCache | None:
    if config.cache_dir is None:
        return None
    peer = None if tls is None else TlsPeer(tls, models_name(config.tls_namespace))
    peers = PeerClient(config.store_peers, token=config.token, tls=peer)
    return BlockCache(config.cache_dir, peers, limit_bytes=config.cache_bytes)


def _unknown_function(function_id: str) -> UnknownFunction:
    return UnknownFunction(
        f"id: got {short_repr(function_id)}, expected an attached function", field="id"
    )
