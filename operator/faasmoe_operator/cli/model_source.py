"""The MODEL of a command line: a folder, a GGUF file or a hub id, and its names.

What can be told from this machine's files is checked here, before a process starts. Whether the
hub has a repository is found out by the process that downloads it.
"""

from __future__ import annotations

import glob
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from faasmoe_contracts.store import MANIFEST_NAME
from faasmoe_operator.api.v1alpha1 import patterns
from faasmoe_operator.api.v1alpha1.storage import FILE_SCHEME, HUB_SCHEME
from faasmoe_operator.errors import CommandError

CONFIG_NAME = "config.json"
GGUF_SUFFIX = ".gguf"
MAX_NAME_CHARS = 63
_HUB_ID = re.compile(patterns.HUB_ID)
_SPLIT_PART = re.compile(r"-\d{5}-of-\d{5}$")  # of the name of a split GGUF file
_EXPECTED = "a folder, a GGUF file, or ORG/NAME or ORG/NAME:QUANT on the hub"


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A checkpoint that a command line names.

    Attributes:
        text: MODEL as it was given.
        path: its folder or GGUF file, absolute; None on the hub.
    """

    text: str
    path: Path | None

    @classmethod
    def parse(cls, text: str) -> ModelSource:
        """Find out what MODEL is; raises CommandError that says what was looked for."""
        if text.startswith(HUB_SCHEME):
            if _HUB_ID.fullmatch(text.removeprefix(HUB_SCHEME)):
                return cls(text, None)
            raise _error(text, "expected hf://ORG/NAME, or hf://ORG/NAME:QUANT of GGUF files")
        path = _local_path(text).absolute()
        if text and path.exists():
            _check_local(text, path)
            return cls(text, path.resolve())
        if _HUB_ID.fullmatch(text) and not _looks_local(text):
            return cls(text, None)
        raise _error(text, f"there is no {path}; expected {_EXPECTED}")

    @property
    def uri(self) -> str:
        """The source as in a MoEModel: file:///PATH, hf://ORG/NAME or hf://ORG/NAME:FILE."""
        if self.path is not None:
            return self.path.as_uri()
        return HUB_SCHEME + self.text.removeprefix(HUB_SCHEME)

    @property
    def served_name(self) -> str:
        """The name by which requests address the model: as on the hub, or of the folder or file."""
        if self.path is None:
            return self.text.removeprefix(HUB_SCHEME)
        is_file = self.path.is_file()
        name = _SPLIT_PART.sub("", self.path.stem) if is_file else self.path.name
        return re.sub(r"[^A-Za-z0-9._:-]+", "-", name).lstrip("._:-") or "model"

    def files(self) -> list[Path]:
        """Return the files of a local checkpoint, without folders in it; none on the hub."""
        if self.path is None:
            return []
        if self.path.is_dir():
            paths = list(self.path.iterdir())
        elif _SPLIT_PART.search(self.path.stem):
            paths = list(self.path.parent.glob(f"{_glob_escaped(self.path.stem)}{GGUF_SUFFIX}"))
        else:
            paths = [self.path]
        return sorted(path for path in paths if path.is_file() and not path.name.startswith("."))

    @property
    def name(self) -> str:
        """The MoEModel's own name: lowercase letters, digits and '-'."""
        last_part = self.served_name.rpartition("/")[2].lower()
        return re.sub(r"[^a-z0-9]+", "-", last_part)[:MAX_NAME_CHARS].strip("-") or "model"


def _glob_escaped(split_stem: str) -> str:
    """Return the pattern of all parts of a split file, of the stem of one."""
    return glob.escape(_SPLIT_PART.sub("", split_stem)) + "-*-of-*"


def _local_path(text: str) -> Path:
    if text.startswith(FILE_SCHEME):
        return Path(unquote(urlsplit(text).path))
    return Path(text).expanduser()


def _looks_local(text: str) -> bool:
    is_file = ":" not in text and text.lower().endswith(GGUF_SUFFIX)
    return is_file or text.startswith((".", "~"))


def _check_local(text: str, path: Path) -> None:
    if path.is_file():
        if path.suffix.lower() != GGUF_SUFFIX:
            hint = "; a MoEModel file is given with -f" if path.suffix in (".yaml", ".yml") else ""
            raise _error(text, f"{path} is a file, expected {_EXPECTED}{hint}")
    elif (path / MANIFEST_NAME).is_file() and not (path / CONFIG_NAME).exists():
        raise _error(
            text,
            f"{path} is a store that `faasmoe prepare` wrote, expected its checkpoint; a MoEModel "
            "file names both: spec.model.source and spec.store.path",
        )
    elif not (path / CONFIG_NAME).is_file() and not any(path.glob(f"*{GGUF_SUFFIX}")):
        raise _error(text, _missing_config(path))


def _missing_config(path: Path) -> str:
    """Say what a folder without config.json holds instead."""
    message = f"the folder {path} has no {CONFIG_NAME} and no GGUF file, expected a checkpoint"
    below = sorted(path.glob(f"*/{CONFIG_NAME}"))
    return f"{message}; there is one in {below[0].parent}" if below else message


def _error(text: str, problem: str) -> CommandError:
    return CommandError(f"MODEL: got {text!r}: {problem}", exit_status=2)
