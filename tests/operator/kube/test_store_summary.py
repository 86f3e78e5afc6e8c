"""The store's summary: from the Job's termination log to status and back, and what is refused."""

import json
from typing import Any

import pytest

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


def test_is_the_same_after_the_termination_log_and_after_the_status() -> None:
    assert StoreSummary.from_termination_message(message()) == SUMMARY
    assert StoreSummary.from_status(json.loads(json.dumps(SUMMARY.to_status()))) == SUMMARY


def test_a_folder_has_no_revision_and_no_null_is_written() -> None:
    for given in (None, ...):
        folder = StoreSummary.from_termination_message(message(revision=given))
        assert isinstance(folder, StoreSummary)
        assert folder.revision is None
        assert "revision" not in folder.to_status()


def test_fields_of_a_later_version_are_left_out() -> None:
    assert StoreSummary.from_termination_message(message(later=1)) == SUMMARY


def test_gives_every_layer_in_the_shape_that_plans_take() -> None:
    layers = SUMMARY.expanded_layers()
    assert [layer.index for layer in layers] == list(range(24))
    assert [layer.num_experts for layer in layers] == [60] * 22 + [30] * 2
    assert layers[-1].shared_bytes == 128
    functions = plan_functions(layers, Partitioning(20), model_digest=SUMMARY.digest, key=b"k" * 16)
    assert len(functions) == 22 * 3 + 2 * 2


@pytest.mark.parametrize("reason", list(StoreFailureReason))
def test_a_failure_keeps_its_reason(reason: StoreFailureReason) -> None:
    text = json.dumps({"ok": False, "reason": reason.value, "message": "because"})
    assert StoreSummary.from_termination_message(text) == StoreFailure(reason, "because")
    assert reason.is_permanent is (reason.value in ("SourceUnsupported", "StoreMismatch"))


def test_a_reason_that_is_not_known_is_a_failure_all_the_same() -> None:
    text = json.dumps({"ok": False, "reason": "Rain", "message": "m" * 5000})
    failure = StoreSummary.from_termination_message(text)
    assert failure == StoreFailure(StoreFailureReason.FAILED, "m" * 1024)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "got '', expected a JSON object"),
        ("Traceback (most recent call last):", "expected a JSON object"),
        ("[" * 100_000, "expected a JSON object"),
        ('{"ok": false}', "message: got None, expected a text"),
        ("{}", "message: got None"),
        (message(digest=...), "digest: got nothing"),
        (message(revision=7), "revision: got 7, expected a text or nothing"),
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
def test_a_message_that_makes_no_sense_is_a_failure_that_says_so(text: str, what: str) -> None:
    failure = StoreSummary.from_termination_message(text)
    assert isinstance(failure, StoreFailure)
    assert failure.reason is StoreFailureReason.FAILED
    assert failure.message.startswith("invalid termination message of the store Job: ")
    assert what in failure.message
    assert len(failure.message) < 400


@pytest.mark.parametrize("value", [None, {}, [], {**SUMMARY.to_status(), "sizeBytes": "1"}])
def test_a_status_that_somebody_damaged_is_refused(value: object) -> None:
    with pytest.raises(StoreSummaryError, match=r"status\.model"):
        StoreSummary.from_status(value)
