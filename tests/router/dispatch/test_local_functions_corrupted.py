"""Local fallback computes from verified bytes only, and keeps serving intact experts."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sandbox_processes import PreparedStore, block_specs

from faasmoe_contracts.routing_table import FunctionEndpoints, RoutingTable
from faasmoe_contracts.store import Store
from faasmoe_contracts.wire import Dtype, OutputMode, decode_request, encode_request
from faasmoe_router.dispatch import Dispatcher
from faasmoe_router.dispatch.local_functions import LocalFunctions, map_function
from faasmoe_router.errors import StoreCorrupted


def test_error_names_a_corrupted_expert_and_others_are_computed(
    prepared_store: PreparedStore, tmp_path: Path
) -> None:
    shutil.copytree(prepared_store("mixtral").path, tmp_path / "store")
    store = Store.open(tmp_path / "store")
    layer = store.manifest.layers[0]
    entries = tuple(FunctionEndpoints(spec) for spec in block_specs(store, 4))
    dispatcher = Dispatcher(store, RoutingTable(store.manifest.digest, 0, entries))
    hidden, weight = torch.ones(1, layer.hidden_size), torch.ones(1, 1)  # [T, H], [T, k]

    def compute(expert: int) -> torch.Tensor:
        return dispatcher.compute(0, hidden, torch.tensor([[expert]]), weight)

    expected = [compute(expert) for expert in (0, 7)]
    path = store.path / layer.file
    last_offset = path.stat().st_size - 1  # in the last expert

    def flip_last_bit() -> None:
        with path.open("r+b") as file:
            byte = os.pread(file.fileno(), 1, last_offset)[0]
            os.pwrite(file.fileno(), bytes([byte ^ 1]), last_offset)

    flip_last_bit()
    assert torch.equal(compute(0), expected[0])
    with pytest.raises(StoreCorrupted, match="expert 7 of "):
        compute(7)
    flip_last_bit()
    assert torch.equal(compute(7), expected[1])


def test_function_of_something_else_that_is_corrupted_is_mapped_anew(
    prepared_store: PreparedStore, tmp_path: Path
) -> None:
    intact = prepared_store("mixtral")
    shutil.copytree(intact.path, tmp_path / "store")
    store = Store.open(tmp_path / "store")
    layer, spec = store.manifest.layers[0], block_specs(store, 8)[0]
    path = store.path / layer.file
    frame = encode_request(
        np.ones((1, layer.hidden_size), dtype=np.float32).tobytes(),
        dtype=Dtype.FLOAT32,
        mode=OutputMode.REDUCED,
        layer=0,
        hidden_size=layer.hidden_size,
        n_rows=1,
        pair_row=np.zeros(1, dtype=np.int32),
        pair_expert=np.zeros(1, dtype=np.int32),
        pair_weight=np.ones(1, dtype=np.float32),
    )
    request = decode_request(bytearray(b"".join(frame)))
    mapped = map_function(spec, store)
    functions = LocalFunctions(store, find=lambda _: mapped)
    expected = functions.compute(spec, request)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)  # in place, of the mapped file
    with pytest.raises(StoreCorrupted):
        functions.compute(spec, request)
    shutil.copy(intact.path / layer.file, tmp_path / "intact")
    (tmp_path / "intact").replace(path)  # another file, which `mapped` never sees
    assert torch.equal(functions.compute(spec, request), expected)
