"""What comparing a model with its program has shown, kept for routers of equal models.

How gates choose, how heads are rotated and how scores are scaled follow from the config and the
family's code, not from the weights. A router that starts for the first time watches the modules
compute and compares (observation.py, native_program.py); the next one of an equal config reads here
what was found, in a tenth of the time. Of routers of an equal config that start together one
compares, and the others wait for it. Files lie in the private folder that the processes of one
`faasmoe up` share; without that folder each router compares.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from faasmoe_contracts.atomic_file import write_atomically
from faasmoe_transformers.layer_program import RememberedGate
from faasmoe_transformers.observation import RotaryCall

logger = logging.getLogger(__name__)

FOLDER_ENV = "FAASMOE_VERIFIED_DIR"
FORMAT = 1
MAX_WAIT_S = 10.0  # for a comparison of another router; one takes a second or less
POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class RememberedLayer:
    """A decoder layer.

    Attributes:
        routing: its gate; None without experts.
        rotary_call: which of the rotary calls computes its angles; None for none.
        rope: how these rotate heads.
        rope_width: elements of a head that they rotate.
    """

    routing: RememberedGate | None
    rotary_call: int | None
    rope: int
    rope_width: int


@dataclass(frozen=True, slots=True)
class RememberedPass:
    """What a pass of a model's modules has shown.

    Attributes:
        hidden_size: width of hidden states.
        embedding_scale: factor between the embeddings and the first layer's input.
        output_type: class of the decoder's output.
        rotary_calls: the calls that compute angles.
        layers: the decoder layers in order.
        head_scale: factor of the scores; None if the modules compute them.
    """

    hidden_size: int
    embedding_scale: float
    output_type: Any
    rotary_calls: list[RotaryCall]
    layers: list[RememberedLayer]
    head_scale: float | None

    def to_json(self, decoder: Any) -> dict[str, Any]:
        """Return a JSON object; raises ValueError if a rotary call has other arguments than JSON's.

        Args:
            decoder: the module with the layers.
        """
        names = {id(module): name for name, module in decoder.named_modules()}
        return {
            "hidden_size": self.hidden_size,
            "embedding_scale": self.embedding_scale,
            "output_type": [self.output_type.__module__, self.output_type.__qualname__],
            "rotary_calls": [
                [names[id(call.module)], _plain(call.args), _plain(call.kwargs)]
                for call in self.rotary_calls
            ],
            "layers": [asdict(layer) for layer in self.layers],
            "head_scale": self.head_scale,
        }

    @classmethod
    def from_json(cls, value: Any, decoder: Any) -> RememberedPass:
        """Read what `to_json` returned; raises ValueError, TypeError, LookupError or the like."""
        module, name = value["output_type"]
        calls = [
            RotaryCall(decoder.get_submodule(path), tuple(args), dict(kwargs))
            for path, args, kwargs in value["rotary_calls"]
        ]
        layers = [
            RememberedLayer(
                None if layer["routing"] is None else RememberedGate(**layer["routing"]),
                layer["rotary_call"],
                layer["rope"],
                layer["rope_width"],
            )
            for layer in value["layers"]
        ]
        return cls(
            value["hidden_size"],
            value["embedding_scale"],
            getattr(importlib.import_module(module), name),
            calls,
            layers,
            value["head_scale"],
        )


def _plain(value: Any) -> Any:
    """Return a value that JSON keeps as it is; raises ValueError for any other."""
    copied = json.loads(json.dumps(value, default=_refuse))
    if copied != (list(value) if isinstance(value, tuple) else value):
        raise ValueError(f"{value!r} is not kept")
    return copied


def _refuse(value: Any) -> Any:
    raise ValueError(f"{type(value).__name__} is not kept")


class ProgramMemory:
    """What was found about models of equal configs.

    Args:
        folder: where it is kept; None keeps nothing.
        library: the kernel library's file, of which another build is compared anew.
    """

    def __init__(self, folder: Path | None, library: Path) -> None:
        self._folder = folder
        self._library = library

    @classmethod
    def from_environment(cls, library: Path, env: Mapping[str, str] = os.environ) -> ProgramMemory:
        """Return the memory in the folder of FAASMOE_VERIFIED_DIR."""
        folder = env.get(FOLDER_ENV)
        return cls(Path(folder) if folder else None, library)

    def recall(self, model: Any, decoder: Any) -> RememberedPass | None:
        """Return what was found about a model of an equal config; None if nothing was."""
        if self._folder is None:
            return None
        file = self._file(self._folder, model)
        try:
            return RememberedPass.from_json(json.loads(file.read_bytes()), decoder)
        except FileNotFoundError:
            return None
        except Exception as error:  # a file of another program: compare
            logger.warning("%s: cannot be used, comparing instead: %s", file, error)
            return None

    def remember(self, model: Any, decoder: Any, found: RememberedPass) -> None:
        """Keep what was found about a model."""
        if self._folder is None:
            return
        file = self._file(self._folder, model)
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            write_atomically(file, json.dumps(found.to_json(decoder)).encode(), 0o600)
        except (OSError, ValueError, LookupError) as error:  # others will compare, too
            logger.info("%s: not kept: %s", file, error)

    @contextmanager
    def turn(self, model: Any) -> Iterator[bool]:
        """Wait for comparisons of models of an equal config, then keep others waiting.

        Yields whether it has waited, after which `recall` may return more than before. A process
        that ends gives up its turn; one that hangs is waited for `MAX_WAIT_S`.
        """
        lock = self._open_lock(model)
        if lock is None:
            yield False
            return
        try:
            yield _acquire(lock, time.monotonic() + MAX_WAIT_S)
        finally:
            os.close(lock)  # and with it the lock

    def _open_lock(self, model: Any) -> int | None:
        """Return the descriptor of a model's lock file; None if there can be none."""
        if self._folder is None:
            return None
        path = self._file(self._folder, model).with_suffix(".lock")
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            logger.info("%s: comparing without it: %s", path, error)
            return None

    def _file(self, folder: Path, model: Any) -> Path:
        config = model.config.to_dict()
        config.pop("_name_or_path", None)
        status = self._library.stat()
        parts = (
            *(FORMAT, type(model).__qualname__, str(model.dtype)),
            *(torch.__version__, transformers.__version__),
            *(str(self._library), status.st_size, status.st_mtime_ns),
            json.dumps(config, sort_keys=True, default=str),
        )
        return folder / f"program-{hashlib.sha256(repr(parts).encode()).hexdigest()[:32]}.json"


def _acquire(lock: int, deadline_s: float) -> bool:
    """Lock a file, or give up at a time on the monotonic clock; return whether another had."""
    has_waited = False
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            has_waited = True
            if time.monotonic() >= deadline_s:
                return has_waited
            time.sleep(POLL_S)
        else:
            return has_waited
