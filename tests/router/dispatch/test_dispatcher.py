"""A layer through sandboxes equals the family's own module, whatever faults the sandboxes have."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from families.registry import FAMILIES, experts_modules
from sandbox_processes import (
    PreparedStore,
    SandboxProcess,
    StartSandbox,
    block_specs,
    make_function_spec,
)
from torch import Tensor, nn

from faasmoe_contracts.routing_table import FunctionEndpoints, RoutingTable, RoutingTableError
from faasmoe_contracts.store import Store
from faasmoe_contracts.wire import (
    Dtype,
    FrameHeader,
    FrameKind,
    OutputMode,
    encode_response,
    max_rows_per_frame,
)
from faasmoe_router.dispatch import Dispatcher
from faasmoe_router.dispatch.fanout import DispatchTimeouts
from faasmoe_router.dispatch.metrics import DispatchMetrics

TOKEN = "a-token"
CLOSED, OTHER_CLOSED = "127.0.0.1:1", "127.0.0.1:2"  # refuse connections
FAMILY = "mixtral"
LAYER = 1


@pytest.fixture(scope="module")
def sandbox_server(sandbox: StartSandbox) -> Iterator[SandboxProcess]:
    with sandbox(capacity=1000, token=TOKEN) as sandbox_server:
        yield sandbox_server


@pytest.fixture(scope="module")
def store(prepared_store: PreparedStore) -> Store:
    return prepared_store(FAMILY)


@pytest.fixture(scope="module")
def table(sandbox_server: SandboxProcess, store: Store) -> RoutingTable:
    return sandbox_server.attach_blocks(store, 3)


@pytest.fixture
def dispatch() -> Iterator[Callable[..., Dispatcher]]:
    """Creates dispatchers, and closes them."""
    made: list[Dispatcher] = []

    def make(store: Store, table: RoutingTable, **options: Any) -> Dispatcher:
        options = {"token": TOKEN, "metrics": DispatchMetrics(), **options}
        made.append(Dispatcher(store, table, **options))
        return made[-1]

    yield make
    for dispatcher in made:
        dispatcher.close()


Dispatch = Callable[..., Dispatcher]


@cache
def own_module(family: str = FAMILY) -> nn.Module:
    model = next(f for f in FAMILIES if f.name == family).build()
    return list(experts_modules(model).values())[LAYER]


def batch(n_rows: int, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [T, H], indices [T, k], weights [T, k]."""
    generator = torch.Generator().manual_seed(n_rows)
    return (
        torch.randn(n_rows, 32, generator=generator).to(dtype),
        torch.rand(n_rows, 8, generator=generator).topk(2).indices,
        torch.rand(n_rows, 2, generator=generator),
    )


def with_addresses(table: RoutingTable, *addresses: str) -> RoutingTable:
    """Return the table with these addresses for every function."""
    return replace(table, functions=tuple(replace(f, addresses=addresses) for f in table.functions))


def nan_frame() -> bytes:
    """A response to one row, of NaNs."""
    request = FrameHeader(FrameKind.REQUEST, Dtype.FLOAT32, OutputMode.REDUCED, LAYER, 1, 2, 32)
    outputs = torch.full((1, 32), torch.nan).numpy().tobytes()
    return b"".join(bytes(part) for part in encode_response(request, outputs))


def counted(metrics: DispatchMetrics) -> dict[str, float]:
    counters = ("calls", "failed_calls", "local", "sent_bytes", "received_bytes")
    return {name: getattr(metrics, name).collect()[0].samples[0].value for name in counters}


@pytest.mark.parametrize("mode", OutputMode)
@pytest.mark.parametrize("family", [FAMILY, "gpt_oss"])
def test_layer_equals_the_familys_own_module(
    sandbox_server: SandboxProcess,
    prepared_store: PreparedStore,
    dispatch: Dispatch,
    family: str,
    mode: OutputMode,
) -> None:
    store, metrics = prepared_store(family), DispatchMetrics()
    dispatcher = dispatch(store, sandbox_server.attach_blocks(store, 3), mode=mode, metrics=metrics)
    for n_rows in (1, 2, 19):
        got = dispatcher.compute(LAYER, *batch(n_rows))
        with torch.no_grad():
            expected = own_module(family)(*batch(n_rows))
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert counted(metrics)["local"] == 0
    assert counted(metrics)["calls"] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unreduced_results_are_bit_identical_for_every_block_size_and_batch(
    sandbox_server: SandboxProcess,
    prepared_store: PreparedStore,
    dispatch: Dispatch,
    dtype: torch.dtype,
) -> None:
    store = prepared_store(FAMILY, dtype=str(dtype).removeprefix("torch."))
    hidden, index, weight = batch(19, dtype=dtype)
    results = []
    for size in (8, 3, 1):
        dispatcher = dispatch(
            store, sandbox_server.attach_blocks(store, size), mode=OutputMode.UNREDUCED
        )
        results.append(dispatcher.compute(LAYER, hidden, index, weight))
        alone = [
            dispatcher.compute(LAYER, hidden[n, None], index[n, None], weight[n, None])
            for n in range(len(hidden))
        ]
        results.append(torch.cat(alone))
    without_addresses = with_addresses(sandbox_server.attach_blocks(store, 3))
    results.append(
        dispatch(store, without_addresses, mode=OutputMode.UNREDUCED).compute(
            LAYER, hidden, index, weight
        )
    )
    assert all(torch.equal(result, results[0]) for result in results)
    assert results[0].dtype == dtype


@pytest.mark.parametrize("mode", OutputMode)
def test_float32_rows_over_a_16_bit_store_give_the_float32_sum_of_its_outputs(
    sandbox_server: SandboxProcess,
    prepared_store: PreparedStore,
    dispatch: Dispatch,
    mode: OutputMode,
) -> None:
    store = prepared_store(FAMILY, dtype="bfloat16")
    metrics = DispatchMetrics()
    dispatcher = dispatch(store, sandbox_server.attach_blocks(store, 3), mode=mode, metrics=metrics)
    hidden, index, weight = batch(19)
    got = dispatcher.compute(LAYER, hidden, index, weight)
    assert got.dtype == torch.float32
    assert counted(metrics)["local"] == counted(metrics)["failed_calls"] == 0

    rows = hidden.bfloat16()  # [T, H], as in the frames
    rounded = dispatcher.compute(LAYER, rows, index, weight)
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(got.bfloat16(), rounded)

    # Each function's output alone: one expert per slot in bfloat16, or one block's float32 sum.
    partial_sums = torch.zeros_like(hidden)  # [T, H]
    is_reduced = mode is OutputMode.REDUCED
    parts = blocks_of(index) if is_reduced else [index == e for e in range(8)]
    for part in parts:
        chosen = torch.where(part, index, -1)  # [T, k]
        alone = dispatcher.compute(LAYER, rows.float() if is_reduced else rows, chosen, weight)
        partial_sums += alone.float()
    torch.testing.assert_close(got, partial_sums, atol=1e-6, rtol=1e-6)


def blocks_of(index: Tensor) -> list[Tensor]:
    """Masks [T, k] of the slots of each block of three experts."""
    return [index // 3 == block for block in range(3)]


def test_overlapped_work_and_empty_batches_keep_the_routers_dtype(
    prepared_store: PreparedStore, table: RoutingTable, dispatch: Dispatch
) -> None:
    store = prepared_store(FAMILY, dtype="bfloat16")
    dispatcher = dispatch(store, None)
    hidden, index, weight = batch(3)
    done: list[str] = []
    result = dispatcher.compute(
        LAYER, hidden, torch.full_like(index, 99), weight, while_waiting=lambda: done.append("x")
    )
    assert (result.dtype, result.any().item(), done) == (torch.float32, False, ["x"])
    assert dispatcher.compute(LAYER, hidden[:0], index[:0], weight[:0]).dtype == torch.float32


@pytest.mark.parametrize("mode", OutputMode)
def test_batch_larger_than_a_frame_is_split(
    store: Store, table: RoutingTable, dispatch: Dispatch, mode: OutputMode
) -> None:
    max_rows = max_rows_per_frame(hidden_size=32, dtype=Dtype.FLOAT32, mode=mode, top_k=2)
    hidden, index, weight = batch(max_rows + 10)
    index[:, 0], index[:, 1] = 0, 1  # one function gets every row
    metrics = DispatchMetrics()
    got = dispatch(store, table, mode=mode, metrics=metrics).compute(LAYER, hidden, index, weight)
    assert counted(metrics)["calls"] == 2
    assert counted(metrics)["local"] == counted(metrics)["failed_calls"] == 0
    sampled = torch.tensor([0, 1, max_rows - 1, max_rows, max_rows + 9])
    with torch.no_grad():
        expected = own_module()(hidden[sampled], index[sampled], weight[sampled])
    torch.testing.assert_close(got[sampled], expected, atol=1e-4, rtol=1e-4)


def test_each_hit_function_is_called_once(
    store: Store, table: RoutingTable, dispatch: Dispatch
) -> None:
    hidden, index, weight = batch(40)
    metrics = DispatchMetrics()
    dispatch(store, table, metrics=metrics).compute(LAYER, hidden, index % 6, weight)
    assert counted(metrics)["calls"] == 2


@pytest.mark.parametrize("mode", OutputMode)
def test_slot_without_an_expert_adds_nothing(
    store: Store, table: RoutingTable, dispatch: Dispatch, mode: OutputMode
) -> None:
    hidden, index, weight = batch(5)
    index[1, 0], index[2] = 8, -1
    got = dispatch(store, table, mode=mode).compute(LAYER, hidden, index, weight)
    assert not got[2].any()
    weight[1, 0], index[1, 0] = 0, 0
    with torch.no_grad():
        expected = own_module()(hidden[:2], index[:2], weight[:2])
    torch.testing.assert_close(got[:2], expected, atol=1e-4, rtol=1e-4)


def test_batch_without_experts_is_zeros(
    store: Store, table: RoutingTable, dispatch: Dispatch
) -> None:
    hidden, index, weight = batch(3)
    dispatcher = dispatch(store, with_addresses(table, CLOSED))
    assert not dispatcher.compute(LAYER, hidden, torch.full_like(index, 99), weight).any()
    assert dispatcher.compute(LAYER, hidden[:0], index[:0], weight[:0]).shape == (0, 32)


def test_strided_inputs_with_gradients_are_accepted(
    store: Store, table: RoutingTable, dispatch: Dispatch
) -> None:
    hidden, index, weight = batch(6)
    dispatcher = dispatch(store, table)
    expected = dispatcher.compute(LAYER, hidden, index, weight)
    strided = torch.stack((hidden, hidden), dim=2)[:, :, 0].requires_grad_()  # [T, H], strides 2
    got = dispatcher.compute(LAYER, strided, index.T.contiguous().T, weight.double())
    assert torch.equal(got, expected)


@pytest.mark.parametrize("addresses", [(), (CLOSED,), (CLOSED, OTHER_CLOSED)], ids=len)
def test_calls_without_a_response_are_computed_from_the_store(
    store: Store, table: RoutingTable, dispatch: Dispatch, addresses: Sequence[str]
) -> None:
    metrics = DispatchMetrics()
    expected = dispatch(store, table).compute(LAYER, *batch(9))
    got = dispatch(store, with_addresses(table, *addresses), metrics=metrics).compute(
        LAYER, *batch(9)
    )
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
    counts = counted(metrics)
    assert counts["local"] == 3
    assert len(addresses) <= counts["calls"] == counts["failed_calls"] <= 3 * len(addresses)


def test_other_address_is_tried_before_local_fallback(
    sandbox_server: SandboxProcess, store: Store, table: RoutingTable, dispatch: Dispatch
) -> None:
    metrics = DispatchMetrics()
    dispatcher = dispatch(
        store, with_addresses(table, CLOSED, sandbox_server.address), metrics=metrics
    )
    expected = dispatch(store, table).compute(LAYER, *batch(9))
    for _ in range(2):  # round robin: each address is first once
        got = dispatcher.compute(LAYER, *batch(9))
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
    counts = counted(metrics)
    assert counts["calls"] == 6 + counts["failed_calls"]
    assert counts["failed_calls"] > 0  # and none once the address is ejected
    assert counts["local"] == 0


def test_calls_of_each_layer_rotate_over_its_replicas(
    serve: Callable[..., Any],
    sandbox_server: SandboxProcess,
    store: Store,
    table: RoutingTable,
    dispatch: Dispatch,
) -> None:
    """Also if the number of layers is a multiple of the number of replicas."""

    def respond_not_found(connection: Any) -> None:
        while connection.recv(1 << 20):
            connection.sendall(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")

    metrics = DispatchMetrics()
    empty = serve(respond_not_found).address
    dispatcher = dispatch(
        store, with_addresses(table, empty, sandbox_server.address), metrics=metrics
    )
    for _ in range(4):
        for layer in (0, 1):
            before = counted(metrics)["failed_calls"]
            hidden, index, weight = batch(1)
            dispatcher.compute(layer, hidden, index * 0, weight)
            failed = counted(metrics)["failed_calls"] - before
            assert failed in (0, 1)
    assert counted(metrics)["failed_calls"] == 4


@pytest.mark.parametrize(
    ("status", "content"),
    [(500, b"no"), (404, b"no"), (200, b""), (200, b"x" * 100), (200, b"FMOE" + bytes(60))],
)
def test_response_that_is_no_frame_is_a_failed_call(
    serve: Callable[..., Any],
    store: Store,
    table: RoutingTable,
    dispatch: Dispatch,
    status: int,
    content: bytes,
) -> None:
    def behave(connection: Any) -> None:
        while connection.recv(1 << 20):
            head = f"HTTP/1.1 {status} X\r\ncontent-length: {len(content)}\r\n\r\n"
            connection.sendall(head.encode() + content)

    metrics = DispatchMetrics()
    bad = with_addresses(table, serve(behave).address)
    hidden, index, weight = batch(1)
    expected = dispatch(store, table).compute(LAYER, hidden, index * 0, weight)
    got = dispatch(store, bad, metrics=metrics).compute(LAYER, hidden, index * 0, weight)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
    assert (counted(metrics)["failed_calls"], counted(metrics)["local"]) == (1, 1)


def test_sandbox_without_the_function_or_with_another_token_is_skipped(
    sandbox_server: SandboxProcess, store: Store, table: RoutingTable, dispatch: Dispatch
) -> None:
    expected = dispatch(store, table).compute(LAYER, *batch(4))
    unknown = [
        FunctionEndpoints(replace(f.spec, id=f"x{n}"), f.addresses)
        for n, f in enumerate(table.functions)
    ]
    for functions, token in ((tuple(unknown), TOKEN), (table.functions, "wrong")):
        metrics = DispatchMetrics()
        wrong = dispatch(store, replace(table, functions=functions), token=token, metrics=metrics)
        got = wrong.compute(LAYER, *batch(4))
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
        assert counted(metrics)["local"] == counted(metrics)["failed_calls"] > 0


def test_non_finite_response_is_a_failed_call_unless_the_input_was_non_finite(
    serve: Callable[..., Any], store: Store, table: RoutingTable, dispatch: Dispatch
) -> None:
    content = nan_frame()

    def behave(connection: Any) -> None:
        while connection.recv(1 << 20):
            connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(content))
            connection.sendall(content)

    metrics = DispatchMetrics()
    bad = dispatch(store, with_addresses(table, serve(behave).address), metrics=metrics)
    hidden, index, weight = batch(1)
    got = bad.compute(LAYER, hidden, index * 0, weight)
    expected = dispatch(store, table).compute(LAYER, hidden, index * 0, weight)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
    assert (counted(metrics)["failed_calls"], counted(metrics)["local"]) == (1, 1)
    bad.compute(LAYER, hidden * torch.nan, index * 0, weight)
    assert (counted(metrics)["failed_calls"], counted(metrics)["local"]) == (1, 1)


def test_dead_sandbox_is_replaced_by_local_fallback_until_the_table_is_replaced(
    sandbox: StartSandbox, store: Store, table: RoutingTable, dispatch: Dispatch
) -> None:
    metrics = DispatchMetrics()
    timeouts = DispatchTimeouts(connect_timeout_s=5.0, call_timeout_s=20.0)
    expected = dispatch(store, table).compute(LAYER, *batch(4))
    with sandbox(capacity=1000, token=TOKEN) as mortal:
        mine = mortal.attach_blocks(store, 8)
        dispatcher = dispatch(store, mine, metrics=metrics, timeouts=timeouts)
        results = [dispatcher.compute(LAYER, *batch(4))]
        mortal.process.kill()
        mortal.process.wait()
        results.append(dispatcher.compute(LAYER, *batch(4)))
    assert counted(metrics)["local"] == 1
    dispatcher.replace_table(replace(table, version=1))
    results.append(dispatcher.compute(LAYER, *batch(4)))
    assert counted(metrics)["local"] == 1
    for result in results:
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


def test_table_that_does_not_fit_is_refused_and_the_old_one_kept(
    store: Store, table: RoutingTable, dispatch: Dispatch
) -> None:
    dispatcher = dispatch(store, table)
    before = dispatcher.compute(LAYER, *batch(4))
    with pytest.raises(RoutingTableError):
        dispatcher.replace_table(replace(table, model_digest="sha256:00"))
    assert torch.equal(dispatcher.compute(LAYER, *batch(4)), before)


def test_function_over_all_layers_serves_each(
    sandbox_server: SandboxProcess, store: Store, dispatch: Dispatch
) -> None:
    layers = range(len(store.manifest.layers))
    entry = sandbox_server.attach(store, make_function_spec(store, layers, range(8)))
    wide = RoutingTable(store.manifest.digest, 0, (entry,))
    narrow = RoutingTable(
        store.manifest.digest, 0, tuple(FunctionEndpoints(s) for s in block_specs(store, 8))
    )
    for layer in layers:
        got = dispatch(store, wide).compute(layer, *batch(4))
        expected = dispatch(store, narrow).compute(layer, *batch(4))
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
