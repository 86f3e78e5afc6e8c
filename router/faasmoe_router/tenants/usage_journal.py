"""The usage of each request that has ended, in files that are appended to.

What is appended survives the process, however it ends; not the machine. A journal has a number:
the usage file says from which one on its content is to be continued, and older ones are removed
once it is written.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

from faasmoe_router.tenants.usage import REQUEST_OUTCOMES, RequestOutcome, RouterUsage

logger = logging.getLogger(__name__)

PREFIX = "usage-journal-"


@dataclass(frozen=True, slots=True)
class RequestUsage:
    """Usage of one request.

    Attributes:
        tenant: whose it was.
        prompt_tokens: tokens of its prompt.
        generated_tokens: tokens generated.
        outcome: how it ended.
        request_id: the same for a request that is repeated; empty if it never is.
    """

    tenant: str
    prompt_tokens: int
    generated_tokens: int
    outcome: RequestOutcome
    request_id: str = ""

    @classmethod
    def from_line(cls, line: bytes) -> RequestUsage:
        """Read a line; raises ValueError, KeyError or TypeError if it is not whole."""
        value = json.loads(line)
        if value["outcome"] not in REQUEST_OUTCOMES:
            raise ValueError(f"outcome: got {value['outcome']!r}, expected one of a request")
        outcome = cast(RequestOutcome, value["outcome"])
        return cls(
            str(value["tenant"]),
            int(value["prompt_tokens"]),
            int(value["generated_tokens"]),
            outcome,
            str(value.get("request_id", "")),
        )

    def add_to(self, usage: RouterUsage) -> None:
        """Count the request."""
        counters = usage.for_tenant(self.tenant)
        counters.prompt_tokens += self.prompt_tokens
        counters.generated_tokens += self.generated_tokens
        counters.requests[self.outcome] += 1


class UsageJournal:
    """Appends to one file after the other in a folder; used by one thread.

    Args:
        folder: the folder.
        number: number of the first file.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self.number = number
        self._folder = folder
        self._descriptor: int | None = None
        self._has_failed = False

    def append(self, usage: RequestUsage) -> None:
        """Write a line; a failure is logged once."""
        try:
            if self._descriptor is None:
                path = journal_path(self._folder, self.number)
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
                self._descriptor = os.open(path, flags, 0o600)
            os.write(self._descriptor, json.dumps(asdict(usage)).encode() + b"\n")
        except OSError as error:
            if not self._has_failed:
                logger.error("The usage of requests cannot be written at once: %s", error)
            self._has_failed = True

    def start_next(self) -> int:
        """Append to another file from now on, if this one has content; return its number."""
        if self._descriptor is not None:
            self.close()
            self._has_failed = False
            self.number += 1
        return self.number

    def close(self) -> None:
        """Close the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def read_from(folder: Path, first: int) -> tuple[list[RequestUsage], int]:
    """Return what the journals from `first` on hold, and the number of the next journal.

    A last line that was not written as a whole is left out, as is one that cannot be read.
    """
    usages: list[RequestUsage] = []
    next_number = first
    for number, path in _journals(folder):
        if number < first:
            continue
        next_number = number + 1
        for line in path.read_bytes().split(b"\n"):
            try:
                if line:
                    usages.append(RequestUsage.from_line(line))
            except (ValueError, KeyError, TypeError) as error:
                logger.error("%s: a line cannot be read and is left out: %s", path, error)
    return usages, next_number


def remove_before(folder: Path, first: int) -> None:
    """Remove the journals that a saved usage contains."""
    for number, path in _journals(folder):
        if number < first:
            path.unlink(missing_ok=True)


def journal_path(folder: Path, number: int) -> Path:
    """Return the path of a journal."""
    return folder / f"{PREFIX}{number}"


def _journals(folder: Path) -> Iterator[tuple[int, Path]]:
    """Return the journals of a folder in their order."""
    found = (
        (int(match[1]), folder / name)
        for name in os.listdir(folder)
        if (match := re.fullmatch(f"{PREFIX}([0-9]+)", name))
    )
    return iter(sorted(found))
