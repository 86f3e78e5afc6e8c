"""GGUF checkpoints that cannot be prepared: each is one clear error, and fuzzed ones never more."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_models import GGUF_FAMILIES, Tensors, build_model, file_tensors, write_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from faasmoe_router.checkpoint.gguf.architectures import ARCHITECTURES
from faasmoe_router.checkpoint.gguf.checkpoint import find_gguf_checkpoint
from faasmoe_router.checkpoint.gguf.metadata import Metadata
from faasmoe_router.checkpoint.gguf.vocabulary import write_tokenizer
from faasmoe_router.checkpoint.prepare import prepare
from faasmoe_router.errors import PrepareError, SourceDamaged, SourceNotFound, SourceUnsupported

FAMILY = GGUF_FAMILIES["qwen2moe"]
F32 = gguf.GGMLQuantizationType.F32
NAN_NORM = np.full(256, np.nan, np.float32)
HEADER_BYTES = 12_000  # all keys and tensors of the tiny file lie before


@pytest.fixture(scope="module")
def model() -> Any:
    return build_model(FAMILY)


@pytest.fixture(scope="module")
def tensors(model: Any) -> Tensors:
    return file_tensors(FAMILY, model, "Q8_0")


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory, model: Any, tensors: Tensors) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    return write_gguf(path, FAMILY, model, tensors.blocks).read_bytes()


Change = Callable[[dict[str, Any]], object]


def _cut(name: str, rows: int) -> Change:
    return lambda blocks: blocks.update({name: (blocks[name][0][:rows], blocks[name][1])})


def _set_scale(name: str, value: float) -> Change:
    def change(blocks: dict[str, Any]) -> None:
        data, kind = blocks[name]
        data = data.copy()
        data.reshape(-1)[:2] = np.array([value], np.float16).view(np.uint8)
        blocks[name] = data, kind

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            lambda blocks: blocks.pop("blk.1.ffn_up_exps.weight"),
            r"ffn_up_exps.weight: got no such tensor, expected one beside blk.1.ffn_gate_exps",
            id="no up projection",
        ),
        pytest.param(
            lambda blocks: blocks.pop("blk.1.ffn_gate_exps.weight"),
            r"ffn_gate_exps.weight: got no such tensor, expected one beside blk.1.ffn_up_exps",
            id="no gate projection",
        ),
        pytest.param(
            lambda blocks: blocks.pop("blk.1.ffn_down_exps.weight"),
            r"got no tensor for model.layers.1.mlp.experts.down_proj, expected every parameter",
            id="no down projection",
        ),
        pytest.param(
            lambda blocks: blocks.pop("blk.1.attn_norm.weight"),
            "blk.1.attn_norm.weight: got nothing, expected a tensor with 1 dimensions",
            id="no last layer",
        ),
        pytest.param(
            _cut("blk.1.ffn_up_exps.weight", 3),
            r"blk.1.ffn_up_exps.weight: got shape \[3, 256, 256\], expected \[4, 256, 256\]",
            id="fewer experts in up",
        ),
        pytest.param(
            _cut("blk.0.ffn_up_exps.weight", 3),
            "qwen2moe.expert_count: got 4, expected 3, as blk.0.ffn_up_exps.weight has it",
            id="lying expert count",
        ),
        pytest.param(
            _cut("token_embd.weight", 100),
            r"tokenizer.ggml.tokens: got '\d+ tokens', expected 1 to 100 tokens",
            id="fewer embeddings than tokens",
        ),
        pytest.param(
            _cut("blk.0.attn_k.weight", 64),
            "attention.head_count_kv: got 128, expected 64, as blk.0.attn_k.weight has it",
            id="lying head count",
        ),
        pytest.param(
            _set_scale("blk.0.ffn_down_exps.weight", float("nan")),
            "blk.0.ffn_down_exps.weight: got a scale that is NaN or infinite, expected finite",
            id="NaN in kept scales",
        ),
        pytest.param(
            _set_scale("blk.0.attn_q.weight", float("inf")),
            "blk.0.attn_q.weight: got values that are not finite, expected finite scales",
            id="infinity in decoded scales",
        ),
        pytest.param(
            lambda blocks: blocks.update({"output_norm.weight": (NAN_NORM, F32)}),
            "output_norm.weight: got values that are NaN or infinite, expected finite weights",
            id="NaN in floats",
        ),
    ],
)
def test_names_what_is_wrong(
    tmp_path: Path, model: Any, tensors: Tensors, change: Change, message: str
) -> None:
    blocks = dict(tensors.blocks)
    change(blocks)
    path = write_gguf(tmp_path / "model.gguf", FAMILY, model, blocks)
    with pytest.raises(SourceUnsupported, match=message):
        prepare(str(path), tmp_path / "store")


@pytest.mark.parametrize(
    ("field", "old", "new", "message"),
    [
        ("qwen2moe.block_count", 2, 0, "block_count: got 0, expected an integer from 1 to 4096"),
        ("qwen2moe.block_count", 2, 3, "blk.2.attn_norm.weight: got nothing, expected a tensor"),
        ("qwen2moe.block_count", 2, 1 << 31, "block_count: got 2147483648, expected an integer"),
        ("qwen2moe.embedding_length", 256, 512, "embedding_length: got 512, expected 256, as tok"),
        (
            "qwen2moe.attention.head_count",
            4,
            3,
            "head_count: got 3, expected half a divisor of the 256",
        ),
        ("qwen2moe.expert_used_count", 2, 9, "expert_used_count: got 9, expected an integer from"),
        ("qwen2moe.context_length", 256, 0, "context_length: got 0, expected an integer from 1"),
        ("tokenizer.ggml.eos_token_id", 0, 4000, "eos_token_id: got 4000, expected an integer"),
    ],
)
def test_names_the_key_that_lies(
    tmp_path: Path, content: bytes, field: str, old: int, new: int, message: str
) -> None:
    prefix = field.encode() + (4).to_bytes(4, "little")
    before, after = (prefix + value.to_bytes(4, "little") for value in (old, new))
    assert content.count(before) == 1
    path = tmp_path / "model.gguf"
    path.write_bytes(content.replace(before, after))
    with pytest.raises(SourceDamaged, match=message):
        prepare(str(path), tmp_path / "store")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": None}, "tokenizer.ggml.tokens: got nothing, expected 1 to 9 tokens"),
        ({"tokens": ["a", "", "b"]}, r"tokens\[1\]: got '0 characters', expected 1 to 1024"),
        ({"tokens": ["x" * 2000]}, r"tokens\[0\]: got '2000 characters', expected 1 to 1024"),
        ({"merges": None}, "tokenizer.ggml.merges: got nothing, expected the merges of a gpt2"),
        ({"merges": ["a z"]}, r"merges\[0\]: got 'a z', expected two tokens and a space"),
        ({"merges": ["ab"]}, r"merges\[0\]: got 'ab', expected two tokens and a space"),
        ({"model": "wordpiece"}, "tokenizer.ggml.model: got 'wordpiece', expected one of gpt2"),
        (
            {"token_type": np.zeros(3, np.int32)},
            "token_type: got '3 items', expected an array of 4",
        ),
        ({"bos_token_id": 4}, "bos_token_id: got 4, expected an integer from 0 to 3"),
        ({"eos_token_id": 3}, r"tokenizer: got token 4 \('｜end｜'\), expected at most 3"),
    ],
)
def test_names_what_is_wrong_with_a_tokenizer(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    valid = {"model": "gpt2", "tokens": ["a", "b", "ab", "｜end｜"], "merges": ["a b"]}
    rows = 9 if "eos_token_id" not in changes else 4
    values = {
        f"tokenizer.ggml.{name}": value
        for name, value in {**valid, **changes}.items()
        if value is not None
    }
    with pytest.raises(SourceUnsupported, match=message):
        write_tokenizer("qwen2moe", Metadata(values, "x.gguf"), tmp_path, max_tokens=rows)


def test_other_architectures_are_refused_with_those_that_are_read(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "deepseek2")
    writer.add_tensor("token_embd.weight", np.zeros((8, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = ", ".join(ARCHITECTURES)
    message = f"general.architecture: got 'deepseek2', expected one of {expected}"
    with pytest.raises(SourceUnsupported, match=message):
        prepare(str(tmp_path / "model.gguf"), tmp_path / "store")


def test_a_missing_file_and_a_missing_part_are_named(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(SourceNotFound, match=r"other.gguf: got no such file, expected a GGUF file"):
        prepare(str(tmp_path / "other.gguf"), tmp_path / "store")
    (tmp_path / "model-00001-of-00002.gguf").write_bytes(content)
    with pytest.raises(SourceNotFound, match=r"model-00002-of-00002.gguf: got no .* of 2 parts"):
        prepare(str(tmp_path / "model-00001-of-00002.gguf"), tmp_path / "store")


def test_a_part_of_another_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    for number in (1, 2):
        (tmp_path / f"model-0000{number}-of-00002.gguf").write_bytes(content)
    with pytest.raises(SourceDamaged, match=r"split.no: got nothing, expected 0: part 1 of 2"):
        prepare(str(tmp_path / "model-00001-of-00002.gguf"), tmp_path / "store")


def test_a_folder_with_two_checkpoints_asks_for_the_file(tmp_path: Path, content: bytes) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceUnsupported, match=r"got 2 GGUF checkpoints \(a.gguf, b.gguf\)"):
        prepare(str(tmp_path), tmp_path / "store")
    with pytest.raises(PrepareError, match="revision: got 'main', expected none for the file"):
        prepare(str(tmp_path / "a.gguf"), tmp_path / "store", revision="main")


def test_a_file_that_is_truncated_during_preparation_is_an_error(
    tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    checkpoint = find_gguf_checkpoint(str(path), revision=None)
    assert checkpoint is not None
    with checkpoint.open_tensors() as opened:
        path.write_bytes(content[: len(content) // 2])
        tensor = opened["lm_head.weight"]
        with pytest.raises(SourceDamaged, match=r"got the end of the file at .* truncated"):
            tensor[...]


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    changes=st.lists(
        st.tuples(st.integers(0, HEADER_BYTES), st.binary(min_size=1, max_size=9)),
        min_size=1,
        max_size=3,
    )
)
def test_mutated_checkpoints_are_opened_or_refused(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, changes: list[tuple[int, bytes]]
) -> None:
    """Header, config, tokenizer and names of a file with changed bytes: only our own error."""
    mutated = bytearray(content)
    for start, data in changes:
        mutated[start : start + len(data)] = data
    path = tmp_path_factory.getbasetemp() / "mutated.gguf"
    path.write_bytes(mutated)
    try:
        checkpoint = find_gguf_checkpoint(str(path), revision=None)
        assert checkpoint is not None
        with checkpoint.open_tensors() as opened:
            assert opened
    except PrepareError as error:
        message = str(error)
    else:
        message = ""
    assert not message or re.search(r"got |rejected by", message)
