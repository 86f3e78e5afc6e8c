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

INSTANCE_DIR_PREFIX = "up-"
INSTANCE_FILE_NAME = "control.json"


@dataclass(frozen=True, slots=True)
class LocalInstance:
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
def private_runtime_dir() -> Iterator[Path]:
    """Make a private folder for this process and remove it at the end; raises CommandError."""
    base = _base_dir()
    _remove_stale(base)
    folder = Path(tempfile.mkdtemp(prefix=INSTANCE_DIR_PREFIX, dir=base))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def register_instance(instance: LocalInstance, folder: Path) -> None:
    """Let other commands of this user find a running `faasmoe up`."""
    temporary = folder / f"{INSTANCE_FILE_NAME}.tmp"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(asdict(instance), file)
    temporary.replace(folder / INSTANCE_FILE_NAME)


def list_instances() -> list[LocalInstance]:
    """Return every `faasmoe up` of this user that runs; raises CommandError."""
    entries = (
        _read_instance(folder) for folder in sorted(_base_dir().glob(f"{INSTANCE_DIR_PREFIX}*"))
    )
    return [entry for entry in entries if entry is not None and entry.is_alive]


def _base_dir() -> Path:
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


def _remove_stale(base: Path) -> None:
    for folder in base.glob(f"{INSTANCE_DIR_PREFIX}*"):
        entry = _read_instance(folder)
        if entry is not None and not entry.is_alive:
            shutil.rmtree(folder, ignore_errors=True)


def _read_instance(folder: Path) -> LocalInstance | None:
    """Return what is announced in a folder; None if nothing is, or it was just removed."""
    try:
        return LocalInstance(**json.loads((folder / INSTANCE_FILE_NAME).read_text()))
    except (OSError, ValueError, TypeError):
        return None
