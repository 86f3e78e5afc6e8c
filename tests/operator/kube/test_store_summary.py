"""StoreSummary: from the Job's termination message to the status and back, and rejections."""

import json
from dataclasses import replace
from typing import Any

import pytest

from faasmoe_contracts.store import QuantizationEntry
from faasmoe_operator.kube.store_summary import (
    LayerGroup,
    StoreFailure,
    StoreFailureReason,
    StoreSummary,
    StoreSummaryError,
)
from faasmoe_operator.plan.functions import Partitioning, plan_functions

SUMMARY = StoreSummary(
    digest="sha256:0",
    revision="c0ffee",
    source="hf://org/name",
    family="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    dtype="bfloat16",
    hidden_size=2048,
    vocab_size=151_936,
    max_position_embeddings=8192,
    num_hidden_layers=24,
    size_bytes=28 << 30,
    router_bytes=3 << 30,
    layers=(LayerGroup(22, 60, 4, 17_301_504, 0), LayerGroup(2, 30, 4, 17_301_504, 128)),
)


def message(**changes: Any) -> str:
    value = {"ok": True, **SUMMARY.to_status(), **changes}
    return json.dumps({name: field for name, field in value.items() if field is not ...})


def test_summary_round_trips_through_termination_log_and_status() -> None:
    assert StoreSummary.from_termination_message(message()) == SUMMARY
    assert StoreSummary.from_status(json.loads(json.dumps(SUMMARY.to_status()))) == SUMMARY


def test_a_missing_revision_is_not_written() -> None:
    for given in (None, ...):
        folder = StoreSummary.from_termination_message(message(revision=given))
        assert isinstance(folder, StoreSummary)
        assert folder.revision is None
        assert "revision" not in folder.to_status()


def test_quantisation_is_written_if_there_is_any() -> None:
    assert not any("uantiz" in field for field in SUMMARY.to_status())
    quantized = replace(
        SUMMARY, quantization=QuantizationEntry("int8", "int4"), router_quantized_bytes=1 << 20
    )
    status = quantized.to_status()
    assert (status["expertsQuantization"], status["routerQuantization"]) == ("int8", "int4")
    assert StoreSummary.from_status(json.loads(json.dumps(status))) == quantized
    invalid = StoreSummary.from_termination_message(message(expertsQuantization="int3"))
    assert isinstance(invalid, StoreFailure)
    assert "expertsQuantization: got 'int3', expected one of none, int8" in invalid.message


def test_ignores_fields_of_later_versions() -> None:
    assert StoreSummary.from_termination_message(message(later=1)) == SUMMARY


def test_expands_groups_into_layers() -> None:
    layers = SUMMARY.expanded_layers()
    assert [layer.index for layer in layers] == list(range(24))
    assert [layer.num_experts for layer in layers] == [60] * 22 + [30] * 2
    assert layers[-1].shared_bytes == 128
    functions = plan_functions(layers, Partitioning(20), model_digest=SUMMARY.digest, key=b"k" * 16)
    assert len(functions) == 22 * 3 + 2 * 2


@pytest.mark.parametrize("reason", list(StoreFailureReason))
def test_parses_the_reason_of_a_failure(reason: StoreFailureReason) -> None:
    text = json.dumps({"ok": False, "reason": reason.value, "message": "because"})
    assert StoreSummary.from_termination_message(text) == StoreFailure(reason, "because")
    assert reason.is_permanent is (reason.value in ("SourceUnsupported", "StoreMismatch"))


def test_an_unknown_reason_becomes_failed() -> None:
    text = json.dumps({"ok": False, "reason": "Rain", "message": "m" * 5000})
    failure = StoreSummary.from_termination_message(text)
    assert failure == StoreFailure(StoreFailureReason.FAILED, "m" * 1024)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "got '', expected a JSON object"),
        ("Traceback (most recent call last):", "expected a JSON object"),
        ("[" * 100_000, "expected a JSON object"),
        ('{"ok": false}', "message: got None, expected a string"),
        ("{}", "message: got None"),
        (message(digest=...), "digest: got nothing"),
        (message(revision=7), "revision: got 7, expected a string or nothing"),
        (message(hiddenSize=0), "hiddenSize: got 0, expected an integer of 1 or more"),
        (message(layers=[]), "layers: got 0, expected 1 to 10000 MoE layers"),
        (message(layers=[{}]), r"layers[0].count: got nothing"),
        (
            message(layers=[{**SUMMARY.layers[0].to_json(), "count": 10**12}]),
            "layers: got 1000000000000, expected 1 to 10000",
        ),
        (message(layers=[{**SUMMARY.layers[0].to_json(), "topK": 61}]), "topK: got 61"),
    ],
)
def test_an_invalid_termination_message_is_a_failure(text: str, what: str) -> None:
    failure = StoreSummary.from_termination_message(text)
    assert isinstance(failure, StoreFailure)
    assert failure.reason is StoreFailureReason.FAILED
    assert failure.message.startswith("invalid termination message of the store Job: ")
    assert what in failure.message
    assert len(failure.message) < 400


@pytest.mark.parametrize("value", [None, {}, [], {**SUMMARY.to_status(), "sizeBytes": "1"}])
def test_rejects_an_invalid_status(value: object) -> None:
    with pytest.raises(StoreSummaryError, match=r"status\.model"):
        StoreSummary.from_status(value)
