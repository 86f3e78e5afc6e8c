"""Why sandboxes cannot be had or used, in words, for as long as it is so. No I/O."""

from __future__ import annotations

from collections.abc import Collection
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

    def note_room(
        self, awaited: Collection[str], *, waiting: Collection[str], too_large: Collection[str]
    ) -> None:
        """Note whether callers wait for functions that there is no memory for.

        Args:
            awaited: functions that callers wait for.
            waiting: functions that wait for others to be idle.
            too_large: functions that fit in no sandbox.
        """
        n_waiting, n_too_large = (len({*awaited} & {*names}) for names in (waiting, too_large))
        if n_waiting or n_too_large:
            told = f"{n_waiting} functions wait for others to be idle, {n_too_large} fit"
            self.failed(Step.FIT, f"memory: {told} in no sandbox")
        else:
            self.worked(Step.FIT)

    @property
    def text(self) -> str:
        """The trouble that is to be told: that of the earliest step; empty if there is none."""
        return next((self._failures[step] for step in Step if step in self._failures), "")
