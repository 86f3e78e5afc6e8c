"""A layer's bits do not depend on where its functions are computed, nor over which path."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from raw_http import wait_until
from sandbox_processes import PreparedStore, SandboxProcess, StartSandbox, block_specs
from torch import Tensor

from faasmoe_contracts.routing_table import FunctionEndpoints, RoutingTable
from faasmoe_contracts.store import Store
from faasmoe_kernels import KernelsUnavailable, load
from faasmoe_router.dispatch import Dispatcher

DEADLINE_S = 20.0
TOKEN = "a-token"
LAYER = 0
N_ROWS, HIDDEN, N_EXPERTS, TOP_K = 16, 32, 8, 4


@pytest.fixture(scope="module", autouse=True)
def _native() -> None:
    try:
        load()
    except KernelsUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def store(prepared_store: PreparedStore) -> Store:
    """Three MoE layers of 8 experts in bfloat16."""
    return prepared_store("mixtral", dtype="bfloat16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("s")


@pytest.fixture(scope="module")
def sandboxes(sandbox: StartSandbox, folder: Path) -> Iterator[Sequence[SandboxProcess]]:
    options: dict[str, Any] = {"capacity": 64, "token": TOKEN, "socket_dir": folder}
    with sandbox(**options) as first, sandbox(**options) as second:
        yield first, second


@pytest.fixture
def compute(store: Store, folder: Path) -> Iterator[Callable[..., Tensor]]:
    """Compute a batch: functions without an address are computed in this process."""
    dispatchers: list[Dispatcher] = []

    def run(
        entries: Sequence[FunctionEndpoints], *, mailbox: bool, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        dispatcher = Dispatcher(
            store, RoutingTable(store.manifest.digest, 0, tuple(entries)), token=TOKEN,
            socket_dir=folder, mailbox=mailbox, computes_overflow=True,
        )  # fmt: skip
        dispatchers.append(dispatcher)
        arguments = batch(dtype)
        if not mailbox:
            return dispatcher.compute(LAYER, *arguments)
        native = dispatcher.native
        assert native is not None
        addresses = {address for f in entries for address in f.addresses}
        assert native.connector.wait_until_open(addresses, DEADLINE_S)
        outputs: list[Tensor] = []

        def is_native() -> bool:  # once what is computed in this process is mapped
            n_before = native._calls.left().layers
            outputs.append(dispatcher.compute(LAYER, *arguments))
            return native._calls.left().layers == n_before + 1

        wait_until(is_native)
        return outputs[-1]

    yield run
    for dispatcher in dispatchers:
        dispatcher.close()


def batch(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [T, H], indices [T, k], weights [T, k]."""
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(N_ROWS, HIDDEN, generator=generator).to(dtype),
        torch.rand(N_ROWS, N_EXPERTS, generator=generator).topk(TOP_K).indices,
        torch.rand(N_ROWS, TOP_K, generator=generator),
    )


def attach(
    sandboxes: Sequence[SandboxProcess], store: Store, experts_per_function: int, places: str
) -> list[FunctionEndpoints]:
    """Attach the functions of all layers where the digits of `places` say, in turn.

    `r` leaves a function to this process.
    """
    entries = []
    for i, spec in enumerate(block_specs(store, experts_per_function)):
        place = places[i % len(places)]
        is_here = place == "r"
        entries.append(
            FunctionEndpoints(spec, ()) if is_here else sandboxes[int(place)].attach(store, spec)
        )
    return entries


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_depend_neither_on_places_nor_on_the_path(
    sandboxes: Sequence[SandboxProcess],
    store: Store,
    compute: Callable[..., Tensor],
    dtype: torch.dtype,
) -> None:
    outputs = {
        (places, mailbox): compute(
            attach(sandboxes, store, 2, places), mailbox=mailbox, dtype=dtype
        )
        for places in ("0", "01", "0011", "1r", "r")
        for mailbox in (True, False)
    }
    expected = outputs["0", True]
    assert expected.dtype == dtype
    for case, output in outputs.items():
        assert torch.equal(output, expected), case


def test_block_sizes_differ_by_the_rounding_of_float32_alone(
    sandboxes: Sequence[SandboxProcess], store: Store, compute: Callable[..., Tensor]
) -> None:
    outputs = [
        compute(attach(sandboxes, store, size, "01"), mailbox=True) for size in (1, 2, 3, 4, 8)
    ]
    largest = float(outputs[0].abs().max())
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=0, atol=TOP_K * 2**-23 * largest)
