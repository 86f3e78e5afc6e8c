"""The private folder of each running `faasmoe up`, by which other commands find it.

All lie in one folder of the user's own, mode 0700: in XDG_RUNTIME_DIR, else in the temporary
folder. What a killed `faasmoe up` left is removed by the next one.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from faasmoe_operator.errors import CommandError

FOLDER_PREFIX = "up-"
FILE_NAME = "control.json"


@dataclass(frozen=True, slots=True)
class Running:
    """One running `faasmoe up`.

    Attributes:
        name: the model's name.
        file: the MoEModel file.
        pid: its process.
        control_url: address of the control API.
        token: the control API's token.
    """

    name: str
    file: str
    pid: int
    control_url: str
    token: str

    @property
    def is_alive(self) -> bool:
        """Whether its process still is there."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True


@contextmanager
def runtime_folder() -> Iterator[Path]:
    """Make a private folder for this process and remove it at the end; raises CommandError."""
    base = _base()
    _remove_left(base)
    folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=base))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def announce(running: Running, folder: Path) -> None:
    """Let other commands of this user find a running `faasmoe up`."""
    unfinished = folder / f"{FILE_NAME}.tmp"
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(asdict(running), file)
    unfinished.replace(folder / FILE_NAME)


def find_running() -> list[Running]:
    """Return every `faasmoe up` of this user that runs; raises CommandError."""
    entries = (_read(folder) for folder in sorted(_base().glob(f"{FOLDER_PREFIX}*")))
    return [entry for entry in entries if entry is not None and entry.is_alive]


def _base() -> Path:
    given = os.environ.get("XDG_RUNTIME_DIR", "")
    name = "faasmoe" if given else f"faasmoe-{os.getuid()}"
    path = Path(given or tempfile.gettempdir()) / name
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise CommandError(f"{path}: cannot be made: {error.strerror}") from error
    is_folder = stat.S_ISDIR(found.st_mode)
    if not is_folder or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise CommandError(f"{path}: expected a folder of our own that nobody else can enter")
    return path


def _remove_left(base: Path) -> None:
    for folder in base.glob(f"{FOLDER_PREFIX}*"):
        entry = _read(folder)
        if entry is not None and not entry.is_alive:
            shutil.rmtree(folder, ignore_errors=True)


def _read(folder: Path) -> Running | None:
    """Return what is announced in a folder; None if nothing is, or it was just removed."""
    try:
        return Running(**json.loads((folder / FILE_NAME).read_text()))
    except (OSError, ValueError, TypeError):
        return None
