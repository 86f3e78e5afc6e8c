"""A sandbox's mailboxes: which functions are computed without Python, and for which routers.

A router on the same machine leaves frames in shared memory, and a native thread answers them
(`faasmoe_kernels.sandbox_loop`). This module publishes attached functions whose kernels are native,
and opens a mailbox for the router at the other end of an authenticated Unix socket. Everything
else, and everything that a mailbox declines, goes over HTTP. See docs/wire.md, "Mailboxes".
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Protocol

from faasmoe_contracts.shared_region import MAX_MAILBOX_BYTES, open_sealed_memory
from faasmoe_expert.config import SandboxConfig
from faasmoe_expert.errors import MailboxRefused
from faasmoe_expert.functions import ExpertFunction
from faasmoe_expert.functions.native_kernel import NativeLayer
from faasmoe_expert.server.shown_work import BUCKETS_S
from faasmoe_kernels import KernelsUnavailable, load
from faasmoe_kernels.function_layers import CallsError, FunctionLayer
from faasmoe_kernels.sandbox_loop import SandboxCounters, SandboxLoop

logger = logging.getLogger(__name__)


class FunctionLoop(Protocol):
    """What serves mailboxes; `SandboxLoop`."""

    def publish(self, function_id: str, layers: Sequence[FunctionLayer]) -> None:
        """Compute frames of a function."""

    def retract(self, function_id: str) -> None:
        """Forget a function, after the frames that are being computed with it."""

    def function_frames(self, function_id: str) -> int:
        """Return the frames computed with a function since it was published."""

    def open(self, descriptor: int, size_bytes: int) -> int:
        """Serve a mailbox; return its handle."""

    def close(self, mailbox: int) -> None:
        """Stop serving a mailbox."""

    def mailbox_frames(self, mailbox: int) -> int:
        """Return the frames answered on a mailbox."""

    def drain(self) -> None:
        """Decline all further frames."""

    def counters(self) -> SandboxCounters:
        """Return the counters since the start."""

    def free(self) -> None:
        """Close all mailboxes."""


class MailboxServer:
    """Publishes functions to the native loop and opens mailboxes; belongs to one thread.

    Args:
        loop: serves the mailboxes.
    """

    def __init__(self, loop: FunctionLoop) -> None:
        self._loop = loop
        self._published: dict[str, tuple[NativeLayer, ...]] = {}
        self._withdrawn: set[str] = set()  # their files did not match when last verified
        self._earlier_frames: dict[str, int] = {}  # of functions that were published anew

    @classmethod
    def create(cls, config: SandboxConfig, device_type: str) -> MailboxServer | None:
        """Return a server; None if mailboxes are switched off or the kernels are not native."""
        if not config.mailbox or device_type != "cpu" or config.socket_dir is None:
            return None
        try:
            library = load()
        except KernelsUnavailable as error:
            logger.info("no mailboxes: %s", error)
            return None
        return cls(SandboxLoop(library, n_threads=config.threads, bounds_s=BUCKETS_S))

    def publish(self, function: ExpertFunction) -> None:
        """Compute a function natively if all of its layers have a native kernel."""
        layers = function.native_layers
        if len(layers) < len(function.spec.layers):
            self._withdraw(function.spec.id)
            return
        function_id = function.spec.id
        self._withdrawn.discard(function_id)
        self._keep_frames(function_id)
        self._loop.publish(function_id, [layer.describe() for layer in layers])
        self._published[function_id] = layers

    def refresh(self, function: ExpertFunction) -> None:
        """Publish a function anew if its file was verified again, or withdraw it if that failed."""
        published = self._published.get(function.spec.id)
        is_current = published is None or function.has_identities(published)
        if not is_current or function.spec.id in self._withdrawn:
            self.publish(function)

    def retract(self, function_id: str) -> None:
        """Stop computing a function, after the frames that are being computed with it."""
        if self._published.pop(function_id, None) is not None:
            self._loop.retract(function_id)
        self._withdrawn.discard(function_id)
        self._earlier_frames.pop(function_id, None)

    def function_frames(self, function_id: str) -> int:
        """Return the frames computed with a function since it was attached."""
        now = self._loop.function_frames(function_id) if function_id in self._published else 0
        return self._earlier_frames.get(function_id, 0) + now

    def open(self, pid: int, descriptor: int, size_bytes: int) -> OpenMailbox:
        """Serve a mailbox in memory that a process shares.

        Args:
            pid: the process.
            descriptor: number of its descriptor.
            size_bytes: expected size.

        Raises:
            MailboxRefused: the memory cannot be mapped or holds no mailbox.
        """
        if not 0 < size_bytes <= MAX_MAILBOX_BYTES:
            raise MailboxRefused(
                f"size_bytes: got {size_bytes}, expected 1 to {MAX_MAILBOX_BYTES}",
                field="size_bytes",
            )
        try:
            own_descriptor = open_sealed_memory(pid, descriptor, size_bytes)
        except OSError as error:
            raise MailboxRefused(f"descriptor: {error}", field="descriptor") from error
        try:
            return OpenMailbox(self._loop, self._loop.open(own_descriptor, size_bytes))
        except CallsError as error:
            raise MailboxRefused(str(error), field="mailbox") from error
        finally:
            os.close(own_descriptor)

    def drain(self) -> None:
        """Decline all further frames."""
        self._loop.drain()

    def counters(self) -> SandboxCounters:
        """Return what mailboxes did since the start."""
        return self._loop.counters()

    def close(self) -> None:
        """Close all mailboxes."""
        self._loop.free()

    def _withdraw(self, function_id: str) -> None:
        if function_id in self._published:
            self._keep_frames(function_id)
            del self._published[function_id]
            self._loop.retract(function_id)
            self._withdrawn.add(function_id)

    def _keep_frames(self, function_id: str) -> None:
        if function_id in self._published:
            self._earlier_frames[function_id] = self.function_frames(function_id)


class OpenMailbox:
    """One router's mailbox."""

    def __init__(self, loop: FunctionLoop, handle: int) -> None:
        self._loop = loop
        self._handle = handle
        self._seen_frames = 0

    def was_used(self) -> bool:
        """Return whether there were frames since the last call."""
        frames = self._loop.mailbox_frames(self._handle)
        was_used, self._seen_frames = frames > self._seen_frames, frames
        return was_used

    def close(self) -> None:
        """Stop serving it, after the frame that is being computed."""
        self._loop.close(self._handle)
