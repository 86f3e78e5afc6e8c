"""Summary of a prepared store: what the operator needs to plan functions and sandboxes. Pure.

The operator never opens a store. The Job that prepares it writes the summary to its termination
log, and the operator keeps it in `status.model`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self

from faasmoe_contracts.store import QuantizationEntry
from faasmoe_contracts.store.json_fields import JsonFields, StoreError
from faasmoe_contracts.store.quantization import EXPERTS_QUANTIZATIONS, ROUTER_QUANTIZATIONS
from faasmoe_operator.errors import FaasmoeError

MAX_LAYERS = 10_000
MAX_MESSAGE_CHARS = 1024
_OPTIONAL: Mapping[str, Any] = {
    "revision": None,
    "expertsQuantization": "none",
    "routerQuantization": "none",
    "routerQuantizedBytes": 0,
}
"""Fields that may be absent, with the value that this stands for."""


class StoreSummaryError(FaasmoeError):
    """An invalid summary; the message names the field, the value and what was expected."""


class StoreFailureReason(StrEnum):
    """Why a store could not be prepared; used as reason of the condition StoreReady."""

    SOURCE_NOT_FOUND = "SourceNotFound"
    SOURCE_UNSUPPORTED = "SourceUnsupported"
    STORE_MISMATCH = "StoreMismatch"
    HUB_UNAUTHORIZED = "HubUnauthorized"
    HUB_UNAVAILABLE = "HubUnavailable"
    NO_SPACE = "NoSpace"
    FAILED = "Failed"

    @property
    def is_permanent(self) -> bool:
        """Whether a retry cannot succeed."""
        return self in (StoreFailureReason.SOURCE_UNSUPPORTED, StoreFailureReason.STORE_MISMATCH)


@dataclass(frozen=True, slots=True)
class StoreFailure:
    """A failed preparation.

    Attributes:
        reason: the reason, stable for machines.
        message: the failure in words.
    """

    reason: StoreFailureReason
    message: str


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Consecutive MoE layers of the same shape.

    Attributes:
        count: number of layers.
        num_experts: routed experts in each layer.
        top_k: experts that each token is routed to.
        expert_bytes: size of one expert's parameters.
        shared_bytes: size of the parameters that every function of a layer needs.
    """

    count: int
    num_experts: int
    top_k: int
    expert_bytes: int
    shared_bytes: int

    @classmethod
    def from_json(cls, value: object, *, where: str) -> Self:
        """Parse a group; raises StoreError that names the field."""
        fields = JsonFields(value, where)
        group = cls(
            count=fields.pop_integer("count", minimum=1),
            num_experts=fields.pop_integer("numExperts", minimum=1),
            top_k=fields.pop_integer("topK", minimum=1),
            expert_bytes=fields.pop_integer("expertBytes", minimum=1),
            shared_bytes=fields.pop_integer("sharedBytes"),
        )
        if group.top_k > group.num_experts:
            raise fields.error("topK", group.top_k, f"at most {group.num_experts}")
        return group

    def to_json(self) -> dict[str, int]:
        """Return the group as a JSON object."""
        return {
            "count": self.count,
            "numExperts": self.num_experts,
            "topK": self.top_k,
            "expertBytes": self.expert_bytes,
            "sharedBytes": self.shared_bytes,
        }


@dataclass(frozen=True, slots=True)
class LayerSummary:
    """One MoE layer; implements `plan.functions.LayerShape`."""

    index: int
    num_experts: int
    top_k: int
    expert_bytes: int
    shared_bytes: int


@dataclass(frozen=True, slots=True)
class StoreSummary:
    """Content of a prepared store.

    Attributes:
        digest: digest of the store's manifest.
        revision: commit of the hub's repository; None for a folder.
        source: where the checkpoint came from.
        family: transformers' `model_type`.
        architecture: transformers' model class.
        dtype: dtype of the stored weights.
        quantization: what of them is quantised.
        hidden_size: width of the hidden states.
        vocab_size: size of the vocabulary.
        max_position_embeddings: the model's maximum context length, in tokens.
        num_hidden_layers: number of layers, dense ones included.
        size_bytes: size of all files.
        router_bytes: size of the tensors that the router loads.
        layers: the MoE layers, in order.
        router_quantized_bytes: the part of `router_bytes` that is quantised.
    """

    digest: str
    revision: str | None
    source: str
    family: str
    architecture: str
    dtype: str
    hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    num_hidden_layers: int
    size_bytes: int
    router_bytes: int
    layers: tuple[LayerGroup, ...]
    quantization: QuantizationEntry = QuantizationEntry()  # noqa: RUF009
    router_quantized_bytes: int = 0

    @classmethod
    def from_status(cls, value: object) -> StoreSummary:
        """Parse `status.model`, ignoring unknown fields; raises StoreSummaryError."""
        try:
            return cls._parse(value, where="status.model")
        except StoreError as error:
            raise StoreSummaryError(str(error)) from error

    @staticmethod
    def from_termination_message(text: str) -> StoreSummary | StoreFailure:
        """Parse the termination message of the store Job; an invalid one is a failure too."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            return _invalid_result(f"got {_truncated_repr(text)}, expected a JSON object")
        if value.get("ok") is not True:
            return _parse_failure(value)
        try:
            return StoreSummary._parse(value, where="termination message")
        except StoreError as error:
            return _invalid_result(str(error))

    @classmethod
    def _parse(cls, value: object, *, where: str) -> StoreSummary:
        # The API server drops null fields, but `revision` is required here.
        fields = JsonFields({**_OPTIONAL, **value} if isinstance(value, Mapping) else value, where)
        summary = cls(
            digest=fields.pop_string("digest"),
            revision=_parse_revision(fields),
            source=fields.pop_string("source"),
            family=fields.pop_string("family"),
            architecture=fields.pop_string("architecture"),
            dtype=fields.pop_string("dtype"),
            hidden_size=fields.pop_integer("hiddenSize", minimum=1),
            vocab_size=fields.pop_integer("vocabSize", minimum=1),
            max_position_embeddings=fields.pop_integer("maxPositionEmbeddings", minimum=1),
            num_hidden_layers=fields.pop_integer("numHiddenLayers", minimum=1),
            size_bytes=fields.pop_integer("sizeBytes", minimum=1),
            router_bytes=fields.pop_integer("routerBytes"),
            layers=tuple(
                LayerGroup.from_json(group, where=f"layers[{index}]")
                for index, group in enumerate(fields.pop_array("layers"))
            ),
            quantization=QuantizationEntry(
                fields.pop_choice("expertsQuantization", EXPERTS_QUANTIZATIONS),
                fields.pop_choice("routerQuantization", ROUTER_QUANTIZATIONS),
            ),
            router_quantized_bytes=fields.pop_integer("routerQuantizedBytes"),
        )
        if not 1 <= summary.n_layers <= MAX_LAYERS:
            raise fields.error("layers", summary.n_layers, f"1 to {MAX_LAYERS} MoE layers")
        return summary

    @property
    def n_layers(self) -> int:
        """Number of MoE layers."""
        return sum(group.count for group in self.layers)

    def to_status(self) -> dict[str, Any]:
        """Return the summary as `status.model`."""
        return {
            "digest": self.digest,
            **({} if self.revision is None else {"revision": self.revision}),
            "source": self.source,
            "family": self.family,
            "architecture": self.architecture,
            "dtype": self.dtype,
            **quantization_status(self.quantization, self.router_quantized_bytes),
            "hiddenSize": self.hidden_size,
            "vocabSize": self.vocab_size,
            "maxPositionEmbeddings": self.max_position_embeddings,
            "numHiddenLayers": self.num_hidden_layers,
            "sizeBytes": self.size_bytes,
            "routerBytes": self.router_bytes,
            "layers": [group.to_json() for group in self.layers],
        }

    def expanded_layers(self) -> tuple[LayerSummary, ...]:
        """Return all MoE layers, by index."""
        groups = [group for group in self.layers for _ in range(group.count)]
        return tuple(
            LayerSummary(
                index, group.num_experts, group.top_k, group.expert_bytes, group.shared_bytes
            )
            for index, group in enumerate(groups)
        )


def quantization_status(quantization: QuantizationEntry, router_bytes: int) -> dict[str, Any]:
    """Return the fields of `status.model` on quantisation; none for what is not quantised.

    Args:
        quantization: what of the store is quantised.
        router_bytes: bytes of the router's quantised weights.
    """
    fields = {
        "expertsQuantization": quantization.experts,
        "routerQuantization": quantization.router,
        "routerQuantizedBytes": router_bytes,
    }
    return {name: value for name, value in fields.items() if value != _OPTIONAL[name]}


def _parse_failure(value: Mapping[str, object]) -> StoreFailure:
    reason, message = value.get("reason"), value.get("message")
    if not isinstance(message, str) or not message:
        return _invalid_result(f"message: got {_truncated_repr(message)}, expected a string")
    failure_reason = next(
        (known for known in StoreFailureReason if known == reason), StoreFailureReason.FAILED
    )
    return StoreFailure(failure_reason, message[:MAX_MESSAGE_CHARS])


def _parse_revision(fields: JsonFields) -> str | None:
    revision = fields.pop("revision")
    if revision is not None and not isinstance(revision, str):
        raise fields.error("revision", revision, "a string or nothing")
    return revision or None


def _invalid_result(problem: str) -> StoreFailure:
    return StoreFailure(
        StoreFailureReason.FAILED, f"invalid termination message of the store Job: {problem}"
    )


def _truncated_repr(value: object) -> str:
    text = repr(value[:80] if isinstance(value, str) else value)
    return text if len(text) <= 80 else f"{text[:80]}…"
