"""Why sandboxes cannot be had or used, in words, for as long as it is so. No I/O."""

from __future__ import annotations

from enum import Enum


class Step(Enum):
    """What has to work for a function to serve, in this order."""

    CREATE = "create"
    START = "start"
    SERVE = "serve"
    FIT = "fit"


class Troubles:
    """The last failure of each step that has not worked since."""

    def __init__(self) -> None:
        self._failures: dict[Step, str] = {}

    def failed(self, step: Step, why: str) -> None:
        """Note that a step failed."""
        self._failures[step] = why

    def worked(self, step: Step) -> None:
        """Note that a step worked: what went wrong with it before is over."""
        self._failures.pop(step, None)

    @property
    def text(self) -> str:
        """The trouble that is to be told: that of the earliest step; empty if there is none."""
        return next((self._failures[step] for step in Step if step in self._failures), "")
