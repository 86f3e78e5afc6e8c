"""Whatever a stranger's checkpoint folder holds, it is prepared or refused with one of our errors.

Bounded in memory too: the limits of what is read are those of the files.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from published.checkpoints import build, publish
from published.floats import deepseek_v4
from safetensors.torch import load_file, save_file

from faasmoe_contracts.store import StoreError
from faasmoe_contracts.store.references import StoreMode
from faasmoe_router.checkpoint.prepare import prepare
from faasmoe_router.errors import PrepareError, SourceDamaged, SourceUnsupported

MakeCheckpoint = Callable[..., Path]

VALUES: tuple[Any, ...] = (0, -1, 3, 1 << 31, 10**15, 1e308, "x", "", None, True, [], {}, [[]])
any_checkpoint = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture
def pristine(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    return make_checkpoint("qwen2_moe", name="pristine")


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of codes of three kinds and scales of two, E8M0 among them."""
    config = {"quant_method": "fp8", "weight_block_size": [128, 128], "expert_dtype": "fp4"}
    model = build("deepseek_v4", hidden_size=128, moe_intermediate_size=128)
    return publish(model, tmp_path_factory.mktemp("quantised"), deepseek_v4(), config).folder


def fields(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the paths of the fields of an object and of those in it."""
    for name, field in value.items():
        yield (*path, name)
        if isinstance(field, dict):
            yield from fields(field, (*path, name))


def prepare_or_refuse(folder: Path) -> None:
    """Prepare a store of a folder, unless it is refused; any other error is the test's."""
    shutil.rmtree(folder.parent / "store", ignore_errors=True)
    with suppress(PrepareError, StoreError):
        prepare(str(folder), folder.parent / "store", mode=StoreMode.AUTO)


@any_checkpoint
@given(data=st.data())
def test_any_value_of_a_config_is_read_or_refused(
    pristine: Path, tmp_path: Path, data: st.DataObject
) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(pristine, folder, dirs_exist_ok=True)
    config = json.loads((pristine / "config.json").read_text())
    paths = st.sampled_from(sorted(fields(config)))
    for path in data.draw(st.lists(paths, min_size=1, max_size=2)):
        section = config
        for name in path[:-1]:
            section = section[name] if isinstance(section[name], dict) else {name: None}
        section[path[-1]] = data.draw(st.sampled_from(VALUES))
    (folder / "config.json").write_text(json.dumps(config))
    prepare_or_refuse(folder)


@pytest.mark.parametrize("is_quantised", [False, True])
@any_checkpoint
@given(data=st.data())
def test_any_header_of_a_weight_file_is_read_or_refused(
    is_quantised: bool, pristine: Path, quantised: Path, tmp_path: Path, data: st.DataObject
) -> None:
    pristine = quantised if is_quantised else pristine
    folder = tmp_path / "changed"
    shutil.copytree(pristine, folder, dirs_exist_ok=True)
    content = bytearray((pristine / "model.safetensors").read_bytes())
    (length,) = struct.unpack_from("<Q", content)
    start = data.draw(st.integers(0, 8 + min(length, 2000)))
    match data.draw(st.sampled_from(["byte", "digit", "word", "cut", "repeat", "end"])):
        case "byte":
            content[start] = data.draw(st.integers(0, 255))
        case "digit":
            content[start : start + 1] = b"99999999999999999999"
        case "word":
            content[:8] = struct.pack("<Q", data.draw(st.sampled_from([0, 1, 1 << 40, 1 << 63])))
        case "cut":
            del content[start : start + data.draw(st.integers(1, 64))]
        case "repeat":
            content[start:start] = content[start : start + data.draw(st.integers(1, 64))]
        case "end":
            del content[start:]
    (folder / "model.safetensors").write_bytes(content)
    prepare_or_refuse(folder)


@pytest.mark.parametrize(
    "name",
    [
        "x" * 100_000,
        "experts.0." * 20_000 + "gate_proj.weight",
        f"model.layers.0.mlp.experts.{'9' * 5_000}.up_proj.weight"[:1000],
        "model.layers.99999999999999999999.mlp.experts.0.up_proj.weight",
    ],
)
def test_names_that_no_tensor_has_are_refused(pristine: Path, name: str) -> None:
    tensors = load_file(pristine / "model.safetensors") | {name: torch.zeros(2, 2)}
    save_file(tensors, pristine / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceDamaged, match=r"model.safetensors: got a tensor named '.*expected"):
        prepare(str(pristine), pristine.parent / "store")


@pytest.mark.parametrize("depth", [10**5, 10**15])
def test_more_layers_than_tensors_are_refused_before_they_are_built(
    pristine: Path, depth: int
) -> None:
    config = json.loads((pristine / "config.json").read_text())
    config["num_hidden_layers"] = depth
    (pristine / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceUnsupported, match=rf"num_hidden_layers: got {depth}, expected at mo"):
        prepare(str(pristine), pristine.parent / "store")
