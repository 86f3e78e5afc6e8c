"""A sandbox: the functions attached to this process, and what they compute."""

from __future__ import annotations

import os
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from faasmoe_expert.config import SandboxConfig
from faasmoe_expert.errors import (
    AttachRefused,
    BadAttachment,
    BadFrame,
    OutOfMemory,
    UnknownFunction,
    shown,
)
from faasmoe_expert.functions import ExpertFunction
from faasmoe_expert.functions.function import size_of
from faasmoe_expert.functions.joining import likeness
from faasmoe_expert.functions.upload import Uploader, uploader_to
from faasmoe_expert.server.memory import FunctionMemory, memory_of
from faasmoe_expert.server.metrics import SandboxMetrics
from faasmoe_expert.store import Store, StoreError
from faasmoe_expert.table import FunctionSpec
from faasmoe_expert.wire import Request, WireError, decode_request, encode_response
from faasmoe_expert.wire.checksum import Buffer


@dataclass(frozen=True, slots=True)
class Loaded:
    """A function that is ready to be had, its store, the path that was given for it, its time."""

    function: ExpertFunction
    store: Store
    path: Path
    took_s: float


@dataclass(frozen=True, slots=True)
class Work:
    """A frame that was read, and the function that is to compute it."""

    function: ExpertFunction
    request: Request

    @property
    def likeness(self) -> Hashable:
        """What frames must have in common to be computed as one."""
        return id(self.function), likeness(self.request)


class Sandbox:
    """Attaches, detaches and computes functions; knows nothing of HTTP.

    Belongs to one thread, but for `load`.

    Args:
        config: its settings.
        device: where it computes.
        memory: what functions may take; by default as the settings and the device say.
        uploader: copies functions to the device; by default as the device needs.
    """

    def __init__(
        self,
        config: SandboxConfig,
        device: torch.device,
        *,
        memory: FunctionMemory | None = None,
        uploader: Uploader | None = None,
    ) -> None:
        self.config = config
        self.device = device
        self.metrics = SandboxMetrics()
        self._functions: dict[str, ExpertFunction] = {}
        self._stores: dict[tuple[Path, str], Store] = {}  # of attached functions: folder, digest
        self._memory = memory or memory_of(device, config.memory_bytes)
        self._uploader = uploader or uploader_to(device)

    def list_functions(self) -> dict[str, Any]:
        """Return the sandbox and its functions, for the control plane to read back."""
        return {
            "sandbox": {
                "id": self.config.id,
                "pid": os.getpid(),
                "capacity": self.config.capacity,
                "device": str(self.device),
                "memory": {
                    "limit_bytes": self._memory.limit_bytes(),
                    "used_bytes": self._memory.used_bytes,
                },
            },
            "functions": [_describe(f) for f in self._functions.values()],
        }

    def attach(
        self, spec: FunctionSpec, *, store: Path, model_digest: str
    ) -> tuple[dict[str, Any], bool]:
        """Attach a function; attaching the same once more changes nothing.

        Args:
            spec: the function's id, layers and experts.
            store: folder of the prepared model.
            model_digest: digest that the store's manifest must have.

        Returns:
            What `list_functions` says of the function, and whether it was attached just now.

        Raises:
            AttachRefused: the sandbox is full or holds the id with other experts.
            BadAttachment: a field cannot be used.
            OutOfMemory: there is no memory for it, or it may have no more.
        """
        held = self.held(spec, model_digest)
        if held is not None:
            return held, False
        return self.put(self.load(spec, store=store, model_digest=model_digest)), True

    def held(self, spec: FunctionSpec, model_digest: str) -> dict[str, Any] | None:
        """Return what `list_functions` says of a function that is attached; None if it is not.

        Raises:
            AttachRefused: it could not be attached, either.
        """
        held = self._functions.get(spec.id)
        if held is not None and (held.spec, held.model_digest) == (spec, model_digest):
            return _describe(held)
        self._check_place(spec, held)
        return None

    def load(self, spec: FunctionSpec, *, store: Path, model_digest: str) -> Loaded:
        """Read and verify a function's block; may run beside the other methods, once at a time.

        Raises:
            BadAttachment: a field cannot be used.
            OutOfMemory: there is no memory for it, or it may have no more.
        """
        begun_s = time.perf_counter()
        with torch.no_grad():  # which is told to each thread
            opened = self._store(store, model_digest)
            self._memory.check(size_of(spec, opened))
            function = self._map(spec, opened)
        return Loaded(function, opened, store, time.perf_counter() - begun_s)

    def put(self, loaded: Loaded) -> dict[str, Any]:
        """Have a function from now on; return what `list_functions` says of it."""
        function = loaded.function
        self._memory.take(function.size_bytes)
        self._functions[function.spec.id] = function
        self._stores[loaded.path, function.model_digest] = loaded.store
        self.metrics.attach_seconds.observe(loaded.took_s)
        self._count()
        return _describe(function)

    def detach(self, function_id: str) -> None:
        """Detach a function and give its memory back; raises UnknownFunction."""
        gone = self._functions.pop(function_id, None)
        if gone is None:
            raise _unknown(function_id)
        size_bytes = gone.size_bytes
        del gone
        self._memory.release(size_bytes)
        used = {(f.store_path, f.model_digest) for f in self._functions.values()}
        self._stores = {key: store for key, store in self._stores.items() if key in used}
        self._count()

    def read(self, function_id: str, frame: Buffer) -> Work:
        """Return what a frame asks for.

        Raises:
            UnknownFunction: no such function is attached.
            BadFrame: the frame is malformed or does not fit the function.
        """
        function = self._functions.get(function_id)
        if function is None:
            raise _unknown(function_id)
        try:
            request = decode_request(frame)
        except WireError as error:
            raise BadFrame(str(error), field=error.field) from error
        function.check(request)
        return Work(function, request)

    def compute(self, works: Sequence[Work]) -> list[list[Buffer]]:
        """Return the buffers of the frames that answer work that is alike, computed as one.

        Raises:
            Corrupted: the function's bytes in the store have changed, and are wrong now.
        """
        requests = [work.request for work in works]
        start = time.perf_counter()
        outputs = works[0].function.compute_together(requests)
        self.metrics.compute_seconds.observe(time.perf_counter() - start)
        self.metrics.frames.inc(len(works))
        self.metrics.rows.inc(sum(r.header.n_rows for r in requests))
        return [
            encode_response(request.header, output.view(torch.uint8).numpy().data)
            for request, output in zip(requests, outputs, strict=True)
        ]

    def _check_place(self, spec: FunctionSpec, held: ExpertFunction | None) -> None:
        if held is not None:
            raise AttachRefused(
                f"id: {spec.id} is attached with layers {shown(list(held.spec.layers))} and "
                f"experts {shown(list(held.spec.experts))} of {held.model_digest}, "
                "expected the same",
                field="id",
            )
        capacity = self.config.capacity
        if len(self._functions) >= capacity:
            raise AttachRefused(
                f"capacity: got a function more than the {capacity} of this sandbox",
                field="capacity",
            )

    def _map(self, spec: FunctionSpec, store: Store) -> ExpertFunction:
        try:
            return ExpertFunction(spec, store, uploader=self._uploader)
        except StoreError as error:
            raise BadAttachment(f"store: {error}", field="store") from error
        except torch.OutOfMemoryError as error:
            why = shown(str(error))
        # Only here is nothing left of what was copied: the error's traceback held it.
        self._memory.release()
        raise OutOfMemory(f"memory: cannot be had ({why})", field="memory")

    def _store(self, path: Path, model_digest: str) -> Store:
        try:
            store = self._stores.get((path, model_digest)) or Store.open(path)
        except StoreError as error:
            raise BadAttachment(f"store: {error}", field="store") from error
        if store.manifest.digest != model_digest:
            raise BadAttachment(
                f"model_digest: got {shown(model_digest)}, "
                f"expected {store.manifest.digest} of {path}",
                field="model_digest",
            )
        return store

    def _count(self) -> None:
        self.metrics.functions.set(len(self._functions))
        self.metrics.function_bytes.set(sum(f.size_bytes for f in self._functions.values()))


def _describe(function: ExpertFunction) -> dict[str, Any]:
    return {
        **function.spec.to_json(),
        "model_digest": function.model_digest,
        "size_bytes": function.size_bytes,
        "frames": function.n_frames,
    }


def _unknown(function_id: str) -> UnknownFunction:
    return UnknownFunction(
        f"id: got {shown(function_id)}, expected a function that is attached here", field="id"
    )
