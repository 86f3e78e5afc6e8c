"""The manifest: what a store holds, as frozen values that mirror `manifest.json`."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

from faasmoe_expert.errors import shown
from faasmoe_expert.store.errors import StoreError
from faasmoe_expert.store.fields import Fields

FORMAT = "faasmoe-store"
VERSION = 2
MODEL_DTYPES = ("bfloat16", "float16", "float32")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_BLOCK_DIGEST = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """Size and SHA-256 (hex) of one file of the store."""

    size_bytes: int
    sha256: str

    @classmethod
    def from_json(cls, value: object, *, where: str) -> FileEntry:
        """Read the entry; raises StoreError that names the field."""
        fields = Fields(value, where)
        size_bytes, sha256 = fields.integer("size_bytes"), fields.text("sha256")
        if not _SHA256.fullmatch(sha256):
            raise fields.wrong("sha256", sha256, "64 hexadecimal digits")
        fields.finish()
        return cls(size_bytes, sha256)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of this entry."""
        return {"size_bytes": self.size_bytes, "sha256": self.sha256}


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """Where the model came from and its dimensions."""

    source: str
    revision: str | None
    family: str
    architecture: str
    dtype: str
    hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    num_hidden_layers: int

    @classmethod
    def from_json(cls, value: object, *, where: str = "model") -> ModelEntry:
        """Read the entry; raises StoreError that names the field."""
        fields = Fields(value, where)
        revision = fields.take("revision")
        if revision is not None and not isinstance(revision, str):
            raise fields.wrong("revision", revision, "a string or null")
        entry = cls(
            source=fields.text("source"),
            revision=revision,
            family=fields.text("family"),
            architecture=fields.text("architecture"),
            dtype=fields.text("dtype"),
            hidden_size=fields.integer("hidden_size", least=1),
            vocab_size=fields.integer("vocab_size", least=1),
            max_position_embeddings=fields.integer("max_position_embeddings", least=1),
            num_hidden_layers=fields.integer("num_hidden_layers", least=1),
        )
        fields.finish()
        if entry.dtype not in MODEL_DTYPES:
            raise fields.wrong("dtype", entry.dtype, f"one of {', '.join(MODEL_DTYPES)}")
        return entry

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of this entry."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class LayerEntry:
    """One experts module.

    Attributes:
        index: counts the model's experts modules; the layer number of functions and of the wire.
        name: the module's name in the model.
        file: its file in the store.
        class_name: the family's class (`class` in JSON).
        kernel: the lean kernel that agreed with the class, or None: only the class itself is right.
        expert_bytes: bytes of one expert over all stacked parameters.
        shared_bytes: bytes of the parameters that are not stacked over experts.
        digests: of each expert's bytes, and last of those that are not stacked; what is read is
            compared with them (`faasmoe_expert.functions.verification`).
    """

    index: int
    name: str
    file: str
    num_experts: int
    top_k: int
    hidden_size: int
    class_name: str
    kernel: Mapping[str, Any] | None
    expert_bytes: int
    shared_bytes: int
    digests: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, value: object, *, index: int) -> LayerEntry:
        """Read the entry at position `index`; raises StoreError that names the field."""
        fields = Fields(value, f"layers[{index}]")
        got = fields.integer("index")
        if got != index:
            raise fields.wrong("index", got, str(index))
        kernel = fields.take("kernel")
        if kernel is not None and not isinstance(kernel, dict):
            raise fields.wrong("kernel", kernel, "an object or null")
        entry = cls(
            index=index,
            name=fields.text("name"),
            file=fields.text("file"),
            num_experts=fields.integer("num_experts", least=1),
            top_k=fields.integer("top_k", least=1),
            hidden_size=fields.integer("hidden_size", least=1),
            class_name=fields.text("class"),
            kernel=kernel,
            expert_bytes=fields.integer("expert_bytes", least=1),
            shared_bytes=fields.integer("shared_bytes"),
            digests=tuple(fields.items("digests")),
        )
        fields.finish()
        if not all(isinstance(d, str) and _BLOCK_DIGEST.fullmatch(d) for d in entry.digests):
            raise fields.wrong("digests", list(entry.digests), "texts of 32 hexadecimal digits")
        if len(entry.digests) != entry.num_experts + 1:
            raise fields.wrong("digests", len(entry.digests), f"{entry.num_experts + 1} of them")
        if entry.top_k > entry.num_experts:
            raise fields.wrong("top_k", entry.top_k, f"at most {entry.num_experts}")
        return entry

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of this entry."""
        value = {name: getattr(self, name) for name in self.__slots__}
        value["class"] = value.pop("class_name")
        value["kernel"] = None if self.kernel is None else dict(self.kernel)
        value["digests"] = list(self.digests)
        return value


@dataclass(frozen=True, slots=True)
class Manifest:
    """All that `manifest.json` says; its presence means that the store is complete."""

    digest: str
    model: ModelEntry
    layers: tuple[LayerEntry, ...]
    files: Mapping[str, FileEntry]

    @classmethod
    def describing(
        cls,
        *,
        model: ModelEntry,
        layers: tuple[LayerEntry, ...],
        files: Mapping[str, FileEntry],
    ) -> Manifest:
        """Return the manifest of a store with this in it; its digest follows from the rest."""
        content = cls("", model, layers, files)
        return replace(content, digest=manifest_digest(content.to_json()))

    @classmethod
    def from_json(cls, value: object) -> Manifest:
        """Read a manifest; raises StoreError that names the field, what was got and expected."""
        fields = Fields(value, "manifest")
        for name, expected in (("format", FORMAT), ("version", VERSION)):
            got = fields.take(name)
            if type(got) is not type(expected) or got != expected:
                raise fields.wrong(name, got, repr(expected))
        entries = fields.mapping("files")
        files = {
            _relative(name): FileEntry.from_json(entry, where=f"files[{name!r}]")
            for name, entry in entries.items()
        }
        layers = fields.items("layers")
        manifest = cls(
            digest=fields.text("digest"),
            model=ModelEntry.from_json(fields.take("model")),
            layers=tuple(LayerEntry.from_json(v, index=i) for i, v in enumerate(layers)),
            files=files,
        )
        fields.finish()
        manifest._check()
        return manifest

    def _check(self) -> None:
        if not self.layers:
            raise StoreError("manifest.layers: got none, expected at least one experts module")
        for layer in self.layers:
            if layer.file not in self.files:
                raise StoreError(
                    f"layers[{layer.index}].file: got {layer.file!r}, expected a name in files"
                )
        expected = manifest_digest(self.to_json())
        if self.digest != expected:
            raise StoreError(
                f"manifest.digest: got {shown(self.digest)}, expected {expected!r}: the manifest "
                "was changed or is an earlier version's; prepare the store again with --force"
            )

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of this manifest."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "digest": self.digest,
            "model": self.model.to_json(),
            "layers": [layer.to_json() for layer in self.layers],
            "files": {name: entry.to_json() for name, entry in sorted(self.files.items())},
        }


def manifest_digest(value: Mapping[str, Any]) -> str:
    """Return the digest of a manifest's JSON object: over all that it says but the digest itself.

    The same content gives the same digest, in whatever order its fields stand.
    """
    content = {name: field for name, field in value.items() if name != "digest"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _relative(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or str(path) != name or name == ".":
        raise StoreError(f"files: got the name {name!r}, expected a path inside the store")
    return name
