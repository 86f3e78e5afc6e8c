"""The models of one control process, as the launcher writes them to a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from faasmoe_contracts.json_reader import ContractError, ObjectReader, parse_json
from faasmoe_operator.errors import FaasmoeError

LOCAL_NAMESPACE = "local"
"""Where the API of the control process has the models, which have no namespaces."""
ROUTERS_PATH = "/routers"
"""Where it is asked which routers may run."""
WARM_PATH = "/warm"
"""Where it is told of a model whose first router starts, so that functions are there with it."""
MAX_MODELS = 1024
MIN_KEY_BYTES = 16


class ModelsFileError(FaasmoeError):
    """The file is invalid; the message names the field."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model of the machine.

    Attributes:
        name: name of the MoEModel.
        file: the MoEModel file; its store must be prepared.
        function_key: secret from which function ids are derived, the same at every start.
        zygote_socket: Unix socket of the zygote that forks its sandboxes.
    """

    name: str
    file: Path
    function_key: bytes
    zygote_socket: Path


@dataclass(frozen=True, slots=True)
class ModelsFile:
    """The whole file.

    Attributes:
        models: the models.
        memory_bytes: memory of all their functions and routers together; None for no limit.
        separate_sandboxes: whether each model has sandboxes of its own.
    """

    models: tuple[ServedModel, ...]
    memory_bytes: int | None = None
    separate_sandboxes: bool = False

    def shares_sandboxes(self, zygote_socket: Path) -> bool:
        """Return whether a zygote's sandboxes hold functions of several models."""
        n_models = sum(model.zygote_socket == zygote_socket for model in self.models)
        return n_models > 1 and not self.separate_sandboxes

    def dumps(self) -> str:
        """Return the content."""
        models = [
            {
                "name": model.name,
                "file": str(model.file),
                "function_key": model.function_key.hex(),
                "zygote_socket": str(model.zygote_socket),
            }
            for model in self.models
        ]
        document = {
            "models": models,
            "memory_bytes": self.memory_bytes,
            "separate_sandboxes": self.separate_sandboxes,
        }
        return json.dumps(document, indent=1)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file; raises ModelsFileError or OSError."""
        try:
            value = parse_json(path.read_bytes(), field="models file")
            known = ("models", "memory_bytes", "separate_sandboxes")
            reader = ObjectReader(value, field="models file", known=known)
            limit = None if reader.get("memory_bytes") is None else reader.count("memory_bytes")
            models = _read_models(reader.array("models", max_length=MAX_MODELS))
            is_separate = reader.flag("separate_sandboxes", default=False)
        except ContractError as error:
            raise ModelsFileError(f"{path}: {error}") from error
        return cls(models, limit, is_separate)


def _read_models(values: Sequence[object]) -> tuple[ServedModel, ...]:
    models = []
    for index, value in enumerate(values):
        path = f"models.{index}"
        known = ("name", "file", "function_key", "zygote_socket")
        reader = ObjectReader(value, field=path, path=path, known=known)
        texts = {name: reader.get(name) for name in known}
        for name, text in texts.items():
            if not isinstance(text, str) or not text:
                raise reader.error(name, "a text")
        try:
            key = bytes.fromhex(str(texts["function_key"]))
        except ValueError:
            key = b""
        if len(key) < MIN_KEY_BYTES:
            received = f"{len(key)} bytes in hexadecimal"
            raise ContractError(f"{path}.function_key", received, f"{MIN_KEY_BYTES} or more")
        models.append(
            ServedModel(
                str(texts["name"]),
                Path(str(texts["file"])),
                key,
                Path(str(texts["zygote_socket"])),
            )
        )
    return tuple(models)
