"""Batches computed by the kernel library give the tokens of transformers' modules, per family."""

import asyncio
import ctypes
import re
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families.registry import FAMILIES, experts_modules
from torch import Tensor
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from faasmoe_kernels import KernelsUnavailable, load
from faasmoe_kernels.router_ops import Draw
from faasmoe_transformers import continuous_batching
from faasmoe_transformers.attention import select_attention_implementation
from faasmoe_transformers.batch_inputs import BatchInputs
from faasmoe_transformers.continuous_batching import (
    BatchingLimits,
    ContinuousBatcher,
    EventLoopOutputRouter,
)
from faasmoe_transformers.errors import UnsupportedModel
from faasmoe_transformers.experts_backend import (
    EXPERTS_IMPLEMENTATION,
    bind_experts,
    register_implementation,
)
from faasmoe_transformers.native_attention import ATTENTION_IMPLEMENTATION
from faasmoe_transformers.native_linear import use_native_linears
from faasmoe_transformers.native_program import ModelProgram
from faasmoe_transformers.native_step import ComputeMode, NativeForward
from faasmoe_transformers.observation import FixedExperts

PROGRAM_FAMILIES = (
    *("aria", "dots1", "glm4_moe", "gpt_oss", "granitemoe", "hy_v3", "mellum", "minimax_m2"),
    *("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "solar_open"),
)
"""Families whose layers all run as one call."""
PROMPTS = [[3, 14, 15, 9, 26, 5, 35], [8, 9], [7] * 40, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]]
N_TOKENS = 12
TIMEOUT_S = 60.0
LIMITS = BatchingLimits(
    n_pages=64, page_tokens=32, max_batch_tokens=32, max_requests=4, max_model_len=128
)


class ArgmaxSampler:
    """Leaves the scores as they are, and keeps them."""

    request_state_type: type = type(None)

    def __init__(self) -> None:
        self.scores: list[Tensor] = []

    def plan_batch(self, request_ids: list[str], rows: Sequence[Any]) -> None:
        """Nothing to prepare."""

    def draws(self) -> None:
        """Has all scores shown to `sample`."""

    def accept_drawn(self, peaks: Sequence[float]) -> None:
        raise AssertionError(peaks)

    def sample(self, scores: Tensor) -> Tensor:
        self.scores.append(scores.clone())
        return scores


class DrawingSampler(ArgmaxSampler):
    """Has the token of each row drawn, always with the same number, and never edits scores."""

    def __init__(self, uniform: float, temperature: float) -> None:
        super().__init__()
        self.uniform, self.temperature = uniform, temperature
        self.n_accepted = 0
        self._n_rows = 0

    def plan_batch(self, request_ids: list[str], rows: Sequence[Any]) -> None:
        self._n_rows = len(request_ids)

    def draws(self) -> Any:
        rows = range(self._n_rows)
        return [Draw(row, 0, 1.0, 0.0, self.uniform, self.temperature) for row in rows]

    def accept_drawn(self, peaks: Sequence[float]) -> None:
        assert len(peaks) == self._n_rows
        self.n_accepted += len(peaks)

    def sample(self, scores: Tensor) -> Tensor:
        raise AssertionError("nothing is left to sample")


BEGUN_HERE = 2  # see fk_experts_port


class NativeExperts(FixedExperts):
    """Computes layers through C function pointers, except for the layer `declined`.

    `local` are the layers that no other process computes for.
    """

    def __init__(self, declined: int = -1, local: Collection[int] = ()) -> None:
        super().__init__()
        self.declined = declined
        self.local = local
        self.begun: list[int] = []
        self.general: list[int] = []
        self.n_passes = self.n_finished_passes = 0
        self._begin = BEGIN(self._begin_layer)
        self._finish = FINISH(self._finish_layer)
        addresses = (ctypes.cast(f, ctypes.c_void_p).value for f in (self._begin, self._finish))
        begin, finish = addresses
        self.program = SimpleNamespace(context=7, begin=begin, finish=finish)
        self.native = self

    def start_pass(self, n_rows: int) -> None:
        assert n_rows > 0
        self.n_passes += 1

    def finish_pass(self) -> None:
        self.n_finished_passes += 1

    def compute_general(self, layer: int, *args: Any, **kwargs: Any) -> Tensor:
        self.general.append(layer)
        return self.compute(layer, *args, **kwargs)

    def _begin_layer(
        self, context: int, layer: int, rows: int, width: int, k: int, *addresses: int
    ) -> int:
        assert context == 7
        if layer == self.declined:
            return 1
        hidden, index, weight = addresses
        self.begun.append(layer)
        self._sum = self.compute(
            layer,
            view(hidden, ctypes.c_float, torch.float32, rows, width),
            view(index, ctypes.c_int64, torch.int64, rows, k),
            view(weight, ctypes.c_float, torch.float32, rows, k),
        )
        return BEGUN_HERE if layer in self.local else 0

    def _finish_layer(self, context: int, layer: int, out: int) -> int:
        assert context == 7
        assert layer == self.begun[-1]
        view(out, ctypes.c_float, torch.float32, *self._sum.shape).copy_(self._sum)
        return 0


POINTER, INT32, INT64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
BEGIN = ctypes.CFUNCTYPE(INT32, POINTER, INT64, INT64, INT64, INT64, POINTER, POINTER, POINTER)
FINISH = ctypes.CFUNCTYPE(INT32, POINTER, INT64, POINTER)


def view(address: int, ctype: Any, dtype: torch.dtype, rows: int, columns: int) -> Tensor:
    memory = (ctype * (rows * columns)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).view(rows, columns)


class FailingExperts(FixedExperts):
    """Raises in one layer."""

    def compute(self, layer: int, *args: Any, **kwargs: Any) -> Tensor:
        if layer == 1:
            raise ArithmeticError("no experts today")
        return super().compute(layer, *args, **kwargs)


class FailingOnce(FixedExperts):
    """Raises once, in the last of `n_layers` layers, in the first chunk of more than one token
    that follows an earlier chunk.
    """

    def __init__(self, n_layers: int) -> None:
        super().__init__()
        self.n_layers, self.n_failures = n_layers, 0
        self._last_rows = 0

    def compute(self, layer: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if layer == self.n_layers - 1:
            rows, before = len(hidden), self._last_rows
            self._last_rows = rows
            if before == LIMITS.max_batch_tokens and 1 < rows < before and not self.n_failures:
                self.n_failures += 1
                raise ArithmeticError("once")
        return super().compute(layer, hidden, *args, **kwargs)


@pytest.fixture(autouse=True)
def require_kernels() -> None:
    try:
        load()
    except KernelsUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def build(name: str, experts: FixedExperts | None = None) -> Any:
    """Return a tiny model of a family whose experts are a fixed function."""
    model = next(family for family in FAMILIES if family.name == name).build()
    register_implementation()
    names = list(experts_modules(model))
    model.set_experts_implementation(EXPERTS_IMPLEMENTATION)
    bind_experts(model, names, experts or FixedExperts())
    return model.requires_grad_(False)


def generate(
    model: Any,
    loop: asyncio.AbstractEventLoop,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    compute: ComputeMode = "auto",
    limits: BatchingLimits = LIMITS,
    sampler: ArgmaxSampler | None = None,
) -> tuple[list[list[int]], list[str | None], list[Tensor]]:
    """Return the tokens and the error of each prompt, and all scores."""
    finished = threading.Event()
    tokens: dict[str, list[int]] = {}
    errors: dict[str, str | None] = {}

    def on_outputs(outputs: Sequence[Any], _: Any) -> None:
        for output in outputs:
            if output.is_finished() or output.error is not None:
                tokens[output.request_id] = list(output.generated_tokens)
                errors[output.request_id] = output.error
        if len(tokens) == len(prompts):
            finished.set()

    sampler = sampler or ArgmaxSampler()
    select_attention_implementation(model)
    batcher = ContinuousBatcher(model, limits, sampler=sampler, compute=compute)
    batcher.start(loop, on_outputs)
    for i, prompt in enumerate(prompts):
        batcher.add_request(str(i), prompt, max_tokens=N_TOKENS, stop_token_ids=[])
    while not finished.wait(0.1) and batcher.is_alive:
        pass
    batcher.stop(TIMEOUT_S)
    if batcher.fatal_error is not None:
        raise batcher.fatal_error
    ids = [str(i) for i in range(len(prompts))]
    return [tokens[i] for i in ids], [errors[i] for i in ids], sampler.scores


NOT_BATCHED = re.compile(
    r"Invalid layer type|index_copy_\(\): Source/destination"
    r"|no attribute 'init_continuous_batching'|'NoneType' object has no attribute 'reshape'"
)
"""How transformers' continuous batching fails for families that it cannot run."""


@pytest.mark.parametrize("name", [family.name for family in FAMILIES])
def test_tokens_equal_those_of_the_modules(name: str, loop: asyncio.AbstractEventLoop) -> None:
    try:
        expected, _, _ = generate(build(name), loop, compute="torch")
    except (UnsupportedModel, AttributeError, RuntimeError, TypeError, ValueError) as error:
        if name in PROGRAM_FAMILIES or not NOT_BATCHED.search(str(error)):
            raise
        pytest.skip(f"continuous batching cannot run it: {error}")
    model = build(name)
    use_native_linears(model, load())
    tokens, errors, _ = generate(model, loop)
    decoder = getattr(model, model.base_model_prefix, None)
    is_program = isinstance(getattr(decoder, "forward", None), NativeForward)
    assert errors == [None] * len(PROMPTS)
    assert tokens == expected
    assert is_program == (name in PROGRAM_FAMILIES)


@pytest.mark.parametrize(
    ("compute", "attention", "is_program"),
    [
        ("auto", ATTENTION_IMPLEMENTATION, True),
        ("modules", ATTENTION_IMPLEMENTATION, False),
        ("torch", "sdpa", False),
    ],
)
def test_compute_mode_selects_what_computes_the_decoder(
    loop: asyncio.AbstractEventLoop, compute: ComputeMode, attention: str, is_program: bool
) -> None:
    model = build("qwen2_moe")
    use_native_linears(model, load())
    generate(model, loop, PROMPTS[:1], compute)
    assert model.config._attn_implementation == attention
    assert isinstance(model.model.forward, NativeForward) == is_program


def test_a_batch_of_one_sequence_runs_the_program(loop: asyncio.AbstractEventLoop) -> None:
    expected, _, _ = generate(build("qwen2_moe"), loop, compute="torch")
    model = build("qwen2_moe")
    use_native_linears(model, load())
    tokens, _, _ = generate(model, loop, limits=replace(LIMITS, max_requests=1))
    assert isinstance(model.model.forward, NativeForward)
    assert tokens == expected


def test_tokens_are_drawn_within_the_call_of_a_step(loop: asyncio.AbstractEventLoop) -> None:
    def tokens_of(sampler: ArgmaxSampler) -> list[list[int]]:
        model = build("qwen2_moe")
        use_native_linears(model, load())
        tokens, errors, _ = generate(model, loop, sampler=sampler)
        assert errors == [None] * len(PROMPTS)
        return tokens

    cold, hot = DrawingSampler(0.5, 0.0), DrawingSampler(0.0, 1e6)
    assert tokens_of(cold) == tokens_of(ArgmaxSampler())
    assert tokens_of(hot) == [[0] * N_TOKENS] * len(PROMPTS)  # the first token of the vocabulary
    assert cold.n_accepted == hot.n_accepted == N_TOKENS * len(PROMPTS)


def build_wide(experts: FixedExperts | None = None) -> Any:
    """Return a model whose products are large enough to be divided between threads."""
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=128, hidden_size=576, num_hidden_layers=2, num_attention_heads=9,
        num_key_value_heads=3, moe_intermediate_size=96, shared_expert_intermediate_size=768,
        num_experts=8, num_experts_per_tok=4, max_position_embeddings=256,
    )  # fmt: skip
    model = Qwen2MoeForCausalLM(config).eval().float()
    register_implementation()
    names = list(experts_modules(model))
    model.set_experts_implementation(EXPERTS_IMPLEMENTATION)
    bind_experts(model, names, experts or FixedExperts())
    return model.requires_grad_(False)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_scores_do_not_depend_on_the_number_of_threads(
    loop: asyncio.AbstractEventLoop, set_threads: Callable[[int], None]
) -> None:
    prompts = [[(7 * i + j) % 120 + 1 for i in range(20 + 3 * j)] for j in range(4)]
    _, _, expected = generate(build_wide(), loop, prompts, "torch")
    scores = []
    for n_threads in (1, 2):
        set_threads(n_threads)
        model = build_wide()
        use_native_linears(model, load())
        scores.append(generate(model, loop, prompts)[2])
        assert isinstance(model.model.forward, NativeForward)
    assert sum(map(len, scores[0])) == len(prompts) * N_TOKENS  # a row for each token
    for alone, divided, reference in zip(*scores, expected, strict=True):
        assert torch.equal(alone, divided)
        # transformers computes a row for each request, also for those within their prompts.
        torch.testing.assert_close(alone, reference[: len(alone)], rtol=1e-4, atol=1e-4)


def test_an_error_of_the_experts_fails_the_request(loop: asyncio.AbstractEventLoop) -> None:
    model = build("qwen2_moe")
    use_native_linears(model, load())
    bind_experts(model, list(experts_modules(model)), FailingExperts())
    _, errors, _ = generate(model, loop, PROMPTS[:1])
    assert errors == ["no experts today"]
    assert model.config._attn_implementation == ATTENTION_IMPLEMENTATION
    assert isinstance(model.model.forward, NativeForward)


@pytest.mark.parametrize("is_native", [True, False])
def test_a_chunk_computed_again_sees_the_window_as_it_was(
    loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch, is_native: bool
) -> None:
    prompts = [[(7 * i) % 61 + 1 for i in range(45)]]  # chunks of 32 and 13 tokens
    scores: list[list[Tensor]] = []
    for is_failing in (False, True):
        model = build("gpt_oss")
        n_layers = len(experts_modules(model))
        experts: FixedExperts = FailingOnce(n_layers) if is_failing else FixedExperts()
        bind_experts(model, list(experts_modules(model)), experts)
        assert model.config.sliding_window < 32  # so that the second chunk overwrites the first
        with monkeypatch.context() as patch:
            patch.setattr(continuous_batching, "use_native_attention", lambda _: is_native)
            if is_native:
                patch.undo()
                use_native_linears(model, load())
            _, errors, of_run = generate(model, loop, prompts)
        assert errors == [None]
        scores.append(of_run)
    assert isinstance(experts, FailingOnce)
    assert experts.n_failures == 1
    for undisturbed, again in zip(*scores, strict=True):
        torch.testing.assert_close(again, undisturbed)


@pytest.mark.parametrize("declined", [-1, 1])
@pytest.mark.parametrize("local", [(), (0,), (0, 1)])
def test_native_functions_compute_the_experts(
    loop: asyncio.AbstractEventLoop,
    monkeypatch: pytest.MonkeyPatch,
    declined: int,
    local: tuple[int, ...],
) -> None:
    expected = generate(build("qwen2_moe"), loop, compute="torch")[0]
    experts = NativeExperts(declined, local)
    model = build("qwen2_moe", experts)
    use_native_linears(model, load())
    tokens, errors, _ = generate(model, loop)
    assert (tokens, errors) == (expected, [None] * len(PROMPTS))
    n_layers = len(experts_modules(model))
    assert experts.n_passes == experts.n_finished_passes > 0
    assert len(experts.begun) + len(experts.general) == experts.n_passes * n_layers
    assert set(experts.general) == ({declined} if declined >= 0 else set())


def test_outputs_of_a_batch_are_handed_over_once_the_next_one_is_prepared(
    loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the event loop, which needs the interpreter for them, does not delay the next batch."""
    happened: list[str] = []

    def record(owner: Any, name: str, what: str) -> None:
        original = getattr(owner, name)

        def recorded(*args: Any, **kwargs: Any) -> Any:
            happened.append(what)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, recorded)

    record(BatchInputs, "prepare", "prepare")
    record(ModelProgram, "run_step", "compute")
    record(loop, "call_soon_threadsafe", "outputs")
    model = build("qwen2_moe")
    use_native_linears(model, load())
    tokens, _, _ = generate(model, loop, PROMPTS[:1])
    assert len(tokens[0]) == N_TOKENS
    last = ["prepare", "outputs", "compute"] * (N_TOKENS - 1)
    assert happened == ["prepare", "compute", *last, "outputs"]


@dataclass(frozen=True)
class Output:
    """A request's output, as transformers has it."""

    request_id: str
    has_ended: bool = False

    def is_finished(self) -> bool:
        return self.has_ended


def test_held_outputs_precede_those_that_are_not() -> None:
    delivered: list[list[str]] = []
    loop = SimpleNamespace(is_closed=lambda: False, call_soon_threadsafe=lambda f, *a: f(*a))
    router = EventLoopOutputRouter(
        loop,  # type: ignore[arg-type]
        lambda outputs, cached: delivered.append([output.request_id for output in outputs]),
        lambda request_ids: dict.fromkeys(request_ids, 0),
    )
    router.deliver_batch([Output("a")])
    router.is_holding = True
    router.deliver_batch([Output("a"), Output("b")])
    assert delivered == [["a"]]
    router.deliver(Output("failed"))
    router.release()
    assert delivered == [["a"], ["a", "b", "failed"]]
    router.deliver_batch([Output("a")])
    router.deliver_batch([Output("a"), Output("b", has_ended=True)])
    assert delivered[2:] == [["a", "a", "b"]]
