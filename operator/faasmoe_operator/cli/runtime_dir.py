"""The private runtime folder of each `faasmoe up`, through which other commands find it.

The folders share a parent with mode 0700 in XDG_RUNTIME_DIR or, without that variable, in the
temporary directory. The next `faasmoe up` removes the folders of instances that were killed.
"""

from __future__ import annotations

import fcntl
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
        pid: process id of `faasmoe up`.
        control_url: base URL of the control API.
        token: bearer token of the control API.
        url: base URL of the OpenAI API, without /v1; empty if it was written by an older version.
        served_name: the model's name in requests.
        metrics_url: URL of its router's metrics; empty if they cannot be reached.
    """

    name: str
    file: str
    pid: int
    control_url: str
    token: str
    url: str = ""
    served_name: str = ""
    metrics_url: str = ""

    @property
    def is_alive(self) -> bool:
        """Whether the process exists."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True


@contextmanager
def private_runtime_dir() -> Iterator[Path]:
    """Create a private folder and remove it on exit.

    Raises:
        CommandError: the parent folder cannot be created or is accessible to others.
    """
    base = _base_dir()
    _remove_stale(base)
    folder = Path(tempfile.mkdtemp(prefix=INSTANCE_DIR_PREFIX, dir=base))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def locked_state(folder: Path) -> Iterator[None]:
    """Hold the state folder of a store, which two instances would overwrite for each other.

    A folder that cannot be written is not held: state is not saved there either.

    Raises:
        CommandError: another instance holds it.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        yield
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CommandError(
                f"{folder}: in use by another `faasmoe up` of the same store, expected none",
                exit_status=2,
            ) from error
        yield
    finally:
        os.close(descriptor)


def register_instance(instance: LocalInstance, folder: Path) -> None:
    """Write the file by which other commands of this user find the instance."""
    temporary = folder / f"{INSTANCE_FILE_NAME}.tmp"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(asdict(instance), file)
    temporary.replace(folder / INSTANCE_FILE_NAME)


def list_instances() -> list[LocalInstance]:
    """Return the running instances of this user.

    Raises:
        CommandError: the parent folder cannot be created or is accessible to others.
    """
    folders = sorted(_base_dir().glob(f"{INSTANCE_DIR_PREFIX}*"))
    instances = map(_read_instance, folders)
    return [instance for instance in instances if instance is not None and instance.is_alive]


def _base_dir() -> Path:
    runtime_dir = os.environ.get("XDG_RUNTIME_DIR", "")
    name = "faasmoe" if runtime_dir else f"faasmoe-{os.getuid()}"
    path = Path(runtime_dir or tempfile.gettempdir()) / name
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        info = path.lstat()
    except OSError as error:
        raise CommandError(f"{path}: cannot be created: {error.strerror}") from error
    is_folder = stat.S_ISDIR(info.st_mode)
    if not is_folder or info.st_uid != os.getuid() or stat.S_IMODE(info.st_mode) & 0o077:
        raise CommandError(
            f"{path}: expected a folder owned by this user and inaccessible to others"
        )
    return path


def _remove_stale(base: Path) -> None:
    for folder in base.glob(f"{INSTANCE_DIR_PREFIX}*"):
        instance = _read_instance(folder)
        if instance is not None and not instance.is_alive:
            shutil.rmtree(folder, ignore_errors=True)


def _read_instance(folder: Path) -> LocalInstance | None:
    """Return the instance registered in a folder; None if there is none or it was just removed."""
    try:
        return LocalInstance(**json.loads((folder / INSTANCE_FILE_NAME).read_text()))
    except (OSError, ValueError, TypeError):
        return None
