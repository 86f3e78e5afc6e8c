"""What a prepared store holds, as far as the operator needs it. Pure.

The store's Job writes it to its termination log, the operator keeps it in `status.model` and plans
functions and sandboxes from it: the operator itself never opens a store.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self

from faasmoe_expert.store.errors import StoreError
from faasmoe_expert.store.fields import Fields
from faasmoe_operator.errors import FaasmoeError

MAX_LAYERS = 10_000
MAX_MESSAGE_CHARS = 1024


class StoreSummaryError(FaasmoeError):
    """A summary that cannot be used; names the field, what was got and what was expected."""


class FailureReason(StrEnum):
    """Why a store could not be prepared; stable, the reason of the condition StoreReady."""

    SOURCE_NOT_FOUND = "SourceNotFound"
    SOURCE_UNSUPPORTED = "SourceUnsupported"
    STORE_MISMATCH = "StoreMismatch"
    HUB_UNAUTHORIZED = "HubUnauthorized"
    HUB_UNAVAILABLE = "HubUnavailable"
    NO_SPACE = "NoSpace"
    FAILED = "Failed"

    @property
    def is_final(self) -> bool:
        """Whether trying again cannot help."""
        return self in (FailureReason.SOURCE_UNSUPPORTED, FailureReason.STORE_MISMATCH)


@dataclass(frozen=True, slots=True)
class StoreFailure:
    """Why there is no store.

    Attributes:
        reason: machine-stable.
        message: for people.
    """

    reason: FailureReason
    message: str


@dataclass(frozen=True, slots=True)
class LayerRun:
    """MoE layers that follow each other and are alike.

    Attributes:
        count: how many.
        num_experts: routed experts in each.
        top_k: experts that a token is sent to.
        expert_bytes: size of one expert's parameters.
        shared_bytes: size of the parameters that every block of a layer needs.
    """

    count: int
    num_experts: int
    top_k: int
    expert_bytes: int
    shared_bytes: int

    @classmethod
    def from_json(cls, value: object, *, where: str) -> Self:
        """Read a run; raises StoreError that names the field."""
        fields = Fields(value, where)
        run = cls(
            count=fields.integer("count", least=1),
            num_experts=fields.integer("numExperts", least=1),
            top_k=fields.integer("topK", least=1),
            expert_bytes=fields.integer("expertBytes", least=1),
            shared_bytes=fields.integer("sharedBytes"),
        )
        if run.top_k > run.num_experts:
            raise fields.wrong("topK", run.top_k, f"at most {run.num_experts}")
        return run

    def to_json(self) -> dict[str, int]:
        """Return the JSON object of this run."""
        return {
            "count": self.count,
            "numExperts": self.num_experts,
            "topK": self.top_k,
            "expertBytes": self.expert_bytes,
            "sharedBytes": self.shared_bytes,
        }


@dataclass(frozen=True, slots=True)
class SummaryLayer:
    """One MoE layer, in the shape that plans take (`plan.functions.LayerShape`)."""

    index: int
    num_experts: int
    top_k: int
    expert_bytes: int
    shared_bytes: int


@dataclass(frozen=True, slots=True)
class StoreSummary:
    """A prepared store.

    Attributes:
        digest: of its manifest.
        revision: the hub's commit; None for a folder.
        source: where the checkpoint came from.
        family: transformers' name of the model's family.
        architecture: transformers' class.
        dtype: number format that it is stored in.
        hidden_size: width of the hidden states.
        vocab_size: tokens of the vocabulary.
        max_position_embeddings: the model's context.
        num_hidden_layers: layers, dense ones included.
        size_bytes: size of all its files.
        router_bytes: size of the tensors that the router loads.
        layers: the MoE layers in their order.
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
    layers: tuple[LayerRun, ...]

    @classmethod
    def from_status(cls, value: object) -> StoreSummary:
        """Read `status.model`; raises StoreSummaryError.

        Fields that are not known here are left out, as a later version may have written them.
        """
        try:
            return cls._read(value, where="status.model")
        except StoreError as error:
            raise StoreSummaryError(str(error)) from error

    @staticmethod
    def from_termination_message(text: str) -> StoreSummary | StoreFailure:
        """Read what the store's Job left; a message that makes no sense is a failure too."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            return _unreadable(f"got {_shown(text)}, expected a JSON object")
        if value.get("ok") is not True:
            return _failure(value)
        try:
            return StoreSummary._read(value, where="termination message")
        except StoreError as error:
            return _unreadable(str(error))

    @classmethod
    def _read(cls, value: object, *, where: str) -> StoreSummary:
        # Kubernetes drops fields that are null.
        fields = Fields({"revision": None, **value} if isinstance(value, Mapping) else value, where)
        summary = cls(
            digest=fields.text("digest"),
            revision=_revision(fields),
            source=fields.text("source"),
            family=fields.text("family"),
            architecture=fields.text("architecture"),
            dtype=fields.text("dtype"),
            hidden_size=fields.integer("hiddenSize", least=1),
            vocab_size=fields.integer("vocabSize", least=1),
            max_position_embeddings=fields.integer("maxPositionEmbeddings", least=1),
            num_hidden_layers=fields.integer("numHiddenLayers", least=1),
            size_bytes=fields.integer("sizeBytes", least=1),
            router_bytes=fields.integer("routerBytes"),
            layers=tuple(
                LayerRun.from_json(run, where=f"layers[{index}]")
                for index, run in enumerate(fields.items("layers"))
            ),
        )
        if not 1 <= summary.n_layers <= MAX_LAYERS:
            raise fields.wrong("layers", summary.n_layers, f"1 to {MAX_LAYERS} MoE layers")
        return summary

    @property
    def n_layers(self) -> int:
        """How many MoE layers there are."""
        return sum(run.count for run in self.layers)

    def to_status(self) -> dict[str, Any]:
        """Return `status.model`."""
        return {
            "digest": self.digest,
            **({} if self.revision is None else {"revision": self.revision}),
            "source": self.source,
            "family": self.family,
            "architecture": self.architecture,
            "dtype": self.dtype,
            "hiddenSize": self.hidden_size,
            "vocabSize": self.vocab_size,
            "maxPositionEmbeddings": self.max_position_embeddings,
            "numHiddenLayers": self.num_hidden_layers,
            "sizeBytes": self.size_bytes,
            "routerBytes": self.router_bytes,
            "layers": [run.to_json() for run in self.layers],
        }

    def expanded_layers(self) -> tuple[SummaryLayer, ...]:
        """Return every MoE layer, ascending by index."""
        runs = [run for run in self.layers for _ in range(run.count)]
        return tuple(
            SummaryLayer(index, run.num_experts, run.top_k, run.expert_bytes, run.shared_bytes)
            for index, run in enumerate(runs)
        )


def _failure(value: Mapping[str, object]) -> StoreFailure:
    reason, message = value.get("reason"), value.get("message")
    if not isinstance(message, str) or not message:
        return _unreadable(f"message: got {_shown(message)}, expected a text")
    known = next((known for known in FailureReason if known == reason), FailureReason.FAILED)
    return StoreFailure(known, message[:MAX_MESSAGE_CHARS])


def _revision(fields: Fields) -> str | None:
    revision = fields.take("revision")
    if revision is not None and not isinstance(revision, str):
        raise fields.wrong("revision", revision, "a text or nothing")
    return revision or None


def _unreadable(what: str) -> StoreFailure:
    return StoreFailure(FailureReason.FAILED, f"the store's Job left no result: {what}")


def _shown(value: object) -> str:
    text = repr(value[:80] if isinstance(value, str) else value)
    return text if len(text) <= 80 else f"{text[:80]}…"
