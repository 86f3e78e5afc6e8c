"""The store manifest: frozen dataclasses that mirror `manifest.json`.

Parsing is strict: every field must be present with its type, and unknown fields are errors. The
manifest carries a digest of its own content, and the digests and sizes of all other files.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from faasmoe_contracts.store.json_fields import JsonFields, StoreError
from faasmoe_contracts.store.published import PublishedEntry
from faasmoe_contracts.store.quantization import (
    QuantizationEntry,
    RouterEntry,
    TensorQuantization,
    quantizations_from_json,
)
from faasmoe_contracts.store.referenced_files import FilePlace, is_inner_path
from faasmoe_contracts.store.references import BLOCK_DIGEST, CheckpointEntry
from faasmoe_contracts.text import short_repr

STORE_FORMAT = "faasmoe-store"
STORE_VERSION = 2
MODEL_DTYPES = ("bfloat16", "float16", "float32")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """Size and SHA-256 (hexadecimal) of one file of the store."""

    size_bytes: int
    sha256: str

    @classmethod
    def from_json(cls, value: object, *, path: str) -> FileEntry:
        """Parse the entry; raises StoreError naming the field."""
        fields = JsonFields(value, path)
        size_bytes, sha256 = fields.pop_integer("size_bytes"), fields.pop_string("sha256")
        if not _SHA256.fullmatch(sha256):
            raise fields.error("sha256", sha256, "64 hexadecimal digits")
        fields.reject_unknown()
        return cls(size_bytes, sha256)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of this entry."""
        return {"size_bytes": self.size_bytes, "sha256": self.sha256}


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """Origin and dimensions of the model."""

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
    def from_json(cls, value: object, *, path: str = "model") -> ModelEntry:
        """Parse the entry; raises StoreError naming the field."""
        fields = JsonFields(value, path)
        revision = fields.pop("revision")
        if revision is not None and not isinstance(revision, str):
            raise fields.error("revision", revision, "a string or null")
        entry = cls(
            source=fields.pop_string("source"),
            revision=revision,
            family=fields.pop_string("family"),
            architecture=fields.pop_string("architecture"),
            dtype=fields.pop_string("dtype"),
            hidden_size=fields.pop_integer("hidden_size", minimum=1),
            vocab_size=fields.pop_integer("vocab_size", minimum=1),
            max_position_embeddings=fields.pop_integer("max_position_embeddings", minimum=1),
            num_hidden_layers=fields.pop_integer("num_hidden_layers", minimum=1),
        )
        fields.reject_unknown()
        if entry.dtype not in MODEL_DTYPES:
            raise fields.error("dtype", entry.dtype, f"one of {', '.join(MODEL_DTYPES)}")
        return entry

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of this entry."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class LayerEntry:
    """One experts module, that is one MoE layer.

    Attributes:
        index: MoE layer index, 0-based, as in routing tables and wire frames.
        name: qualified name of the module in the model.
        file: name of its safetensors file in the store; empty, and absent from the JSON, if the
            layer's parameters lie in the checkpoint or partly in shared files.
        num_experts: number of experts in the layer.
        top_k: experts per token.
        hidden_size: elements of one hidden state.
        class_name: the family's module class (`class` in JSON).
        kernel: parameters of the gated kernel that reproduced the class during preparation; None
            if only the class itself computes correct outputs.
        expert_bytes: bytes of one expert in all stacked parameters.
        shared_bytes: bytes of the parameters that are not stacked over experts.
        digests: digest of each expert, then of the shared parameters, see
            `faasmoe_contracts.store.digests`; sandboxes verify mapped bytes against them.
        quantization: how each quantised stacked parameter is stored, by its name; parameters that
            are not named are stored as they are. Absent from the JSON if empty.
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
    quantization: Mapping[str, TensorQuantization] = field(default_factory=dict)

    @classmethod
    def from_json(cls, value: object, *, index: int) -> LayerEntry:
        """Parse the entry at position `index`; raises StoreError naming the field."""
        fields = JsonFields(value, f"layers[{index}]")
        got = fields.pop_integer("index")
        if got != index:
            raise fields.error("index", got, str(index))
        kernel = fields.pop("kernel")
        if kernel is not None and not isinstance(kernel, dict):
            raise fields.error("kernel", kernel, "an object or null")
        entry = cls(
            index=index,
            name=fields.pop_string("name"),
            file=fields.pop_string("file") if fields.has("file") else "",
            num_experts=fields.pop_integer("num_experts", minimum=1),
            top_k=fields.pop_integer("top_k", minimum=1),
            hidden_size=fields.pop_integer("hidden_size", minimum=1),
            class_name=fields.pop_string("class"),
            kernel=kernel,
            expert_bytes=fields.pop_integer("expert_bytes", minimum=1),
            shared_bytes=fields.pop_integer("shared_bytes"),
            digests=tuple(fields.pop_array("digests")),
            quantization=quantizations_from_json(
                fields.pop_optional_object("quantization"), f"layers[{index}].quantization"
            ),
        )
        fields.reject_unknown()
        if not all(isinstance(d, str) and BLOCK_DIGEST.fullmatch(d) for d in entry.digests):
            raise fields.error("digests", list(entry.digests), "strings of 32 hexadecimal digits")
        if len(entry.digests) != entry.num_experts + 1:
            raise fields.error("digests", len(entry.digests), f"{entry.num_experts + 1} of them")
        if entry.top_k > entry.num_experts:
            raise fields.error("top_k", entry.top_k, f"at most {entry.num_experts}")
        return entry

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of this entry."""
        value = {name: getattr(self, name) for name in self.__slots__}
        value["class"] = value.pop("class_name")
        if not self.file:
            del value["file"]
        value["kernel"] = None if self.kernel is None else dict(self.kernel)
        value["digests"] = list(self.digests)
        entries = {name: entry.to_json() for name, entry in value.pop("quantization").items()}
        return value | ({"quantization": entries} if entries else {})


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of `manifest.json`, which is written last: its presence marks a complete store.

    Attributes:
        digest: SHA-256 over the rest of the manifest, see `manifest_digest`.
        model: origin and dimensions of the model.
        layers: one entry per MoE layer, in order.
        files: every other file of the store, by its path relative to the store.
        quantization: what the store was asked to quantise; absent from the JSON if nothing.
        router: the router's quantised modules; absent from the JSON if there are none.
        checkpoint: the tensors that lie in the checkpoint or in shared files, of which the store
            holds no copy; None, and absent from the JSON, if it holds all.
        published: what became of the checkpoint's formats; absent from the JSON if it has none.
    """

    digest: str
    model: ModelEntry
    layers: tuple[LayerEntry, ...]
    files: Mapping[str, FileEntry]
    quantization: QuantizationEntry = QuantizationEntry()  # noqa: RUF009
    router: RouterEntry = field(default_factory=lambda: RouterEntry({}))
    checkpoint: CheckpointEntry | None = None
    published: tuple[PublishedEntry, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Bytes of all files of the store, and of what it refers to beyond them."""
        files = sum(entry.size_bytes for entry in self.files.values())
        return files + (self.checkpoint.size_bytes if self.checkpoint else 0)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensor files of the store, and of what it refers to beyond them."""
        files = self.files.items()
        stored = sum(entry.size_bytes for name, entry in files if name.endswith(".safetensors"))
        return stored + (self.checkpoint.size_bytes if self.checkpoint else 0)

    @property
    def router_bytes(self) -> int:
        """Bytes of the router's tensors, in the store and where it refers to."""
        files = sum(e.size_bytes for name, e in self.files.items() if name.startswith("router/"))
        return files + (self.checkpoint.router_bytes if self.checkpoint else 0)

    @classmethod
    def create(
        cls,
        *,
        model: ModelEntry,
        layers: tuple[LayerEntry, ...],
        files: Mapping[str, FileEntry],
        quantization: QuantizationEntry = QuantizationEntry(),  # noqa: B008
        router: RouterEntry | None = None,
        checkpoint: CheckpointEntry | None = None,
        published: tuple[PublishedEntry, ...] = (),
    ) -> Manifest:
        """Return a manifest of these parts with its digest computed."""
        router = router or RouterEntry({})
        content = cls("", model, layers, files, quantization, router, checkpoint, published)
        return replace(content, digest=manifest_digest(content.to_json()))

    @classmethod
    def from_json(cls, value: object) -> Manifest:
        """Parse and validate a manifest; raises StoreError naming the field, got and expected."""
        fields = JsonFields(value, "manifest")
        for name, expected in (("format", STORE_FORMAT), ("version", STORE_VERSION)):
            got = fields.pop(name)
            if type(got) is not type(expected) or got != expected:
                raise fields.error(name, got, repr(expected))
        entries = fields.pop_object("files")
        files = {
            _relative_path(name): FileEntry.from_json(entry, path=f"files[{name!r}]")
            for name, entry in entries.items()
        }
        layers = fields.pop_array("layers")
        manifest = cls(
            digest=fields.pop_string("digest"),
            model=ModelEntry.from_json(fields.pop("model")),
            layers=tuple(LayerEntry.from_json(v, index=i) for i, v in enumerate(layers)),
            files=files,
            quantization=QuantizationEntry.from_json(
                fields.pop_optional_object("quantization") or QuantizationEntry().to_json()
            ),
            router=RouterEntry.from_json(
                fields.pop_optional_object("router") or RouterEntry({}).to_json()
            ),
            checkpoint=(
                CheckpointEntry.from_json(fields.pop("checkpoint"))
                if fields.has("checkpoint")
                else None
            ),
            published=_parse_published(fields),
        )
        fields.reject_unknown()
        manifest._validate()
        return manifest

    def _validate(self) -> None:
        if not self.layers:
            raise StoreError("manifest.layers: got none, expected at least one experts module")
        referenced = self.checkpoint.layers if self.checkpoint else {}
        if unknown := sorted(set(referenced) - set(range(len(self.layers)))):
            raise StoreError(f"checkpoint.layers: got {unknown[0]}, expected indices of layers")
        for layer in self.layers:
            is_stored, is_referenced = layer.file in self.files, layer.index in referenced
            if is_stored == is_referenced or (is_referenced and layer.file):
                raise StoreError(
                    f"layers[{layer.index}].file: got {layer.file!r}, expected a name in files, or "
                    "none and an entry of checkpoint.layers"
                )
        for i, file in enumerate(self.checkpoint.files if self.checkpoint else ()):
            entry = self.files.get(file.name)
            is_own = entry is not None and entry.size_bytes == file.size_bytes
            if file.place is FilePlace.STORE and not is_own:
                what = f"got {file.name!r}, expected a name in files, of the same size"
                raise StoreError(f"checkpoint.files[{i}].name: {what}")
        expected = manifest_digest(self.to_json())
        if self.digest != expected:
            raise StoreError(
                f"manifest.digest: got {short_repr(self.digest)}, expected {expected!r}: the "
                "manifest was modified or is of an earlier version; "
                "prepare the store again with --force"
            )

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of this manifest."""
        return {
            "format": STORE_FORMAT,
            "version": STORE_VERSION,
            "digest": self.digest,
            "model": self.model.to_json(),
            "layers": [layer.to_json() for layer in self.layers],
            "files": {name: entry.to_json() for name, entry in sorted(self.files.items())},
            **({"quantization": self.quantization.to_json()} if self.quantization else {}),
            **({"router": self.router.to_json()} if self.router.quantized else {}),
            **({"checkpoint": self.checkpoint.to_json()} if self.checkpoint else {}),
            **({"published": [e.to_json() for e in self.published]} if self.published else {}),
        }


def manifest_digest(value: Mapping[str, Any]) -> str:
    """Return the digest of a manifest's JSON object, computed without its own `digest` field.

    Independent of the order of fields.
    """
    content = {name: field for name, field in value.items() if name != "digest"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _parse_published(fields: JsonFields) -> tuple[PublishedEntry, ...]:
    values = fields.pop_array("published") if fields.has("published") else []
    entries = enumerate(values)
    return tuple(PublishedEntry.from_json(v, path=f"published[{i}]") for i, v in entries)


def _relative_path(name: str) -> str:
    if not is_inner_path(name):
        raise StoreError(f"files: got the name {name!r}, expected a path inside the store")
    return name
