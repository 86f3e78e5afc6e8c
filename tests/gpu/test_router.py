"""A router on the device, with functions on the CPU or on the device."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest
import torch
from families.inputs import prompts
from families.reference import upcast_model
from families.registry import FAMILIES, forward_logits
from sandbox_processes import PreparedStore, StartSandbox
from torch import Tensor

from faasmoe_contracts.store import Store
from faasmoe_contracts.wire import OutputMode
from faasmoe_router.dispatch import Dispatcher
from faasmoe_router.dispatch.device_transfer import BufferedTransfer, PinnedMemory, transfer_for
from faasmoe_router.dispatch.metrics import DispatchMetrics
from faasmoe_router.engine.batcher import EngineLimits, start_batcher
from faasmoe_router.errors import RouterConfigError
from faasmoe_router.model_loader import ModelLoadError, load_router_model

FAMILY = "qwen2_moe"
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def store(prepared_store: PreparedStore) -> Store:
    return prepared_store(FAMILY)


@contextmanager
def running_dispatcher(
    sandbox: StartSandbox,
    store: Store,
    *,
    functions: str,
    router: torch.device,
    mode: OutputMode = OutputMode.REDUCED,
) -> Iterator[tuple[Dispatcher, DispatchMetrics]]:
    metrics = DispatchMetrics()
    with sandbox(device=functions, capacity=100) as server:
        table = server.attach_blocks(store, 3)
        transfer = transfer_for(router)
        dispatcher = Dispatcher(store, table, mode=mode, metrics=metrics, device_transfer=transfer)
        try:
            yield dispatcher, metrics
        finally:
            dispatcher.close()


@pytest.mark.parametrize("functions", ["cpu", "cuda"])
def test_logits_equal_the_in_process_models(
    functions: str, sandbox: StartSandbox, store: Store, cuda: torch.device
) -> None:
    family = next(f for f in FAMILIES if f.name == FAMILY)
    expected = forward_logits(family, family.build(), prompts())  # [B, S, V], on the CPU
    with running_dispatcher(sandbox, store, functions=functions, router=cuda) as (
        dispatcher,
        metrics,
    ):
        model = load_router_model(store, dispatcher, device=cuda)
        got = forward_logits(family, model, prompts().to(cuda)).cpu()
        assert metrics.local._value.get() == 0
        assert metrics.calls._value.get() > 0
    assert (got - expected).abs().max() <= TOLERANCE
    assert torch.equal(got.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("functions", ["cpu", "cuda"])
def test_float32_router_calls_bfloat16_functions(
    functions: str, sandbox: StartSandbox, prepared_store: PreparedStore, cuda: torch.device
) -> None:
    family = next(f for f in FAMILIES if f.name == FAMILY)
    store = prepared_store(FAMILY, dtype="bfloat16")
    expected = forward_logits(family, upcast_model(family, store), prompts())  # [B, S, V]
    with running_dispatcher(sandbox, store, functions=functions, router=cuda) as (
        dispatcher,
        metrics,
    ):
        model = load_router_model(store, dispatcher, device=cuda, dtype=torch.float32)
        got = forward_logits(family, model, prompts().to(cuda)).cpu()
        assert metrics.local._value.get() == 0
        assert metrics.calls._value.get() > 0
    assert got.dtype == torch.float32
    assert (got - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("mode", OutputMode)
def test_layer_synchronizes_with_the_device_once(
    sandbox: StartSandbox, store: Store, cuda: torch.device, mode: OutputMode
) -> None:
    from emulated.streams import counts

    with running_dispatcher(sandbox, store, functions="cpu", router=cuda, mode=mode) as (
        dispatcher,
        _,
    ):
        for n_rows in (1, 40, 7):
            inputs = make_layer_inputs(n_rows, n_rows, cuda)
            before = counts.copy()
            dispatcher.compute(0, *inputs)
            assert (counts - before).explicit == 1
            assert (counts - before).implicit == 0


@pytest.fixture
def small_device() -> Iterator[Callable[[int], None]]:
    """Limits the device to so many bytes beyond what is allocated."""
    from emulated.device import allocated_bytes, limit

    def leave(size_bytes: int) -> None:
        limit.size_bytes = allocated_bytes() + size_bytes

    yield leave
    limit.size_bytes = None


@pytest.mark.usefixtures("emulated")
def test_model_that_does_not_fit_is_rejected(
    store: Store, cuda: torch.device, small_device: Callable[[int], None]
) -> None:
    small_device(1000)
    with pytest.raises(ModelLoadError, match=r"does not fit on .*: CUDA out of memory"):
        load_router_model(store, Dispatcher(store, None), device=cuda)


@pytest.mark.usefixtures("emulated")
def test_cache_that_does_not_fit_is_rejected_by_its_setting(
    store: Store, cuda: torch.device, small_device: Callable[[int], None]
) -> None:
    model = load_router_model(store, Dispatcher(store, None), device=cuda)
    small_device(1000)
    with (
        closing(asyncio.new_event_loop()) as loop,
        pytest.raises(RouterConfigError, match="kv_cache_bytes: got none, expected what is free"),
    ):
        start_batcher(
            model,
            EngineLimits(max_model_len=64, max_num_seqs=8),
            loop,
            on_outputs=lambda *_: None,
            on_request_error=lambda *_: None,
        )


def make_layer_inputs(
    n_rows: int, seed: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n_rows, 32, generator=generator)
    index = torch.rand(n_rows, 8, generator=generator).topk(2).indices
    weight = torch.rand(n_rows, 2, generator=generator)
    return hidden.to(device), index.to(device), weight.to(device)


def test_successive_layers_do_not_overwrite_each_others_buffers(cuda: torch.device) -> None:
    """The device is kept busy, so that a buffer overwritten too early shows."""
    transfer = BufferedTransfer(PinnedMemory(cuda))
    size = 2048 if cuda.type == "cuda" else 8
    ballast = torch.randn(size, size, device=cuda)
    backs, expected = [], []

    def keep_behind() -> None:
        torch.mm(ballast, ballast)

    for seed in range(200):
        hidden, index, weight = make_layer_inputs(64 + seed % 7, seed, cuda)
        landed = transfer.to_host(hidden, index, weight, while_waiting=keep_behind)
        assert torch.equal(landed.rows, hidden.cpu())
        assert (landed.top_k_index == index.cpu().numpy()).all()
        keep_behind()
        backs.append(transfer.to_device(landed.rows * 2))
        expected.append(hidden * 2)
    assert all(torch.equal(got, wanted) for got, wanted in zip(backs, expected, strict=True))


def submit_and_wait(
    add: Callable[[str, list[int]], object], done: threading.Event, texts: list[list[int]]
) -> None:
    for number, prompt in enumerate(texts):
        add(str(number), prompt)
    assert done.wait(120)


def test_continuous_batching_gives_the_same_tokens_as_on_the_cpu(
    sandbox: StartSandbox, store: Store, cuda: torch.device
) -> None:
    results = [
        generate_batched(sandbox, store, device, functions)
        for device, functions in ((torch.device("cpu"), "cpu"), (cuda, "cpu"), (cuda, "cuda"))
    ]
    assert results[1] == results[0]
    assert results[2] == results[0]


def generate_batched(
    sandbox: StartSandbox, store: Store, device: torch.device, functions: str
) -> dict[str, list[int]]:
    """Generate greedily from several prompts in one batch; return the tokens by request."""
    vocabulary = store.manifest.model.vocab_size
    texts = [[(7 * i + 3 * j) % vocabulary for j in range(5 + i)] for i in range(6)]
    tokens: dict[str, list[int]] = {}
    done = threading.Event()

    def collect(outputs: Any, _cached: Any) -> None:
        for output in outputs:
            assert output.error is None, output.error
            tokens[output.request_id] = list(output.generated_tokens)
        if len(tokens) == len(texts) and all(len(t) == 8 for t in tokens.values()):
            done.set()

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    with running_dispatcher(sandbox, store, functions=functions, router=device) as (dispatcher, _):
        model = load_router_model(store, dispatcher, device=device)
        thread.start()
        batcher = start_batcher(
            model,
            EngineLimits(max_model_len=64, max_num_seqs=8),
            loop,
            on_outputs=collect,
            on_request_error=lambda *_: done.set(),
        )
        try:
            submit_and_wait(
                lambda name, prompt: batcher.add_request(
                    name, prompt, max_tokens=8, stop_token_ids=()
                ),
                done,
                texts,
            )
        finally:
            batcher.stop(30.0)
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()
    return tokens
