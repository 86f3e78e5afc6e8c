"""Containers as processes of this machine: same command, environment and volumes, but no image.

Each runs in its own mount namespace with an overlay over the machine's file system, so that volumes
can be mounted anywhere and writes are discarded at the end. Needs root.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SYSTEM_MOUNTS = ("/proc", "/sys", "/dev")


@dataclass(frozen=True, slots=True)
class Mount:
    """A folder of this machine, mounted into the container."""

    source: Path
    target: str
    read_only: bool


@dataclass(slots=True)
class Container:
    """One running container.

    Attributes:
        command: its command.
        environment: its complete environment.
        mounts: its volumes.
        folder: folder of its overlay and log.
        termination_log: path of the termination log in the container.
    """

    command: Sequence[str]
    environment: Mapping[str, str]
    mounts: Sequence[Mount]
    folder: Path
    termination_log: str = "/dev/termination-log"
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def start(self) -> None:
        """Start the container."""
        for name in ("upper", "work", "root"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self._termination_log_file.touch()
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                ["unshare", "--mount", "--propagation", "private", "sh", "-euc", self._script()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**self.environment, "PATH": os.environ["PATH"]},
                start_new_session=True,
            )

    @property
    def log_file(self) -> Path:
        """File with its output."""
        return self.folder / "log"

    @property
    def exit_status(self) -> int | None:
        """Its exit status; None while it runs."""
        assert self._process is not None
        return self._process.poll()

    def termination_message(self) -> str:
        """Return its termination message, or the end of its log if it is empty."""
        message = self._termination_log_file.read_text(errors="replace")
        return message or self.log_file.read_text(errors="replace")[-2048:]

    def signal(self, number: int) -> None:
        """Send a signal to all its processes."""
        assert self._process is not None
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return

    def stop(self, *, grace_s: float) -> None:
        """Terminate it and wait until it has exited."""
        assert self._process is not None
        self.signal(signal.SIGTERM)
        try:
            self._process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGKILL)
            self._process.wait()

    @property
    def _termination_log_file(self) -> Path:
        return self.folder / "termination-log"

    def _script(self) -> str:
        root = self.folder / "root"
        layers = f"lowerdir=/,upperdir={self.folder}/upper,workdir={self.folder}/work"
        lines = [f"mount -t overlay overlay -o {layers} {root}"]
        lines += [f"mount --rbind {path} {root}{path}" for path in SYSTEM_MOUNTS]
        for mount in self.mounts:
            target = shlex.quote(f"{root}{mount.target}")
            lines.append(f"mkdir -p {target}")
            lines.append(f"mount --bind {shlex.quote(str(mount.source))} {target}")
            if mount.read_only:
                lines.append(f"mount -o remount,bind,ro {target}")
        log_path = shlex.quote(f"{root}{self.termination_log}")
        lines += [f"touch {log_path}", f"mount --bind {self._termination_log_file} {log_path}"]
        lines.append(f"exec chroot {root} {shlex.join(self.command)}")
        return "\n".join(lines)


def module_command(module: str) -> list[str]:
    """Return the command that runs a module, as the images' entry points do."""
    return [sys.executable, "-m", module]
