"""Golden tests of quantised stores: functions equal the family's module with dequantised weights.

Layer by layer, in float32 and bfloat16, with three block sizes, computed by the native kernels and
by the general path; and the logits of whole models through sandboxes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import torch
from families.inputs import prompts
from families.reference import upcast_model
from families.registry import FAMILIES, Family, experts_modules, forward_logits
from sandbox_processes import PreparedStore, StartSandbox, block_specs
from test_golden import (
    EXPERTS_PER_FUNCTION,
    QUICK_FAMILIES,
    TOLERANCE,
    Sandboxes,
    logits_through_functions,
)
from torch import Tensor

from faasmoe_contracts.store import Store
from faasmoe_contracts.wire import Dtype, OutputMode, decode_request, encode_request
from faasmoe_expert.functions import ExpertFunction, function
from faasmoe_kernels import KernelsUnavailable, load

SCHEMES = ("none", "int8", "int4", "mxfp4")
N_ROWS = 11
WIRE_DTYPES = {torch.float32: Dtype.FLOAT32, torch.bfloat16: Dtype.BFLOAT16}

families = pytest.mark.parametrize(
    "family",
    [
        pytest.param(f, id=f.name, marks=[] if f.name in QUICK_FAMILIES else pytest.mark.slow)
        for f in FAMILIES
    ],
)


@pytest.fixture
def general_path(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function that makes the kernel library unavailable."""

    def unavailable() -> None:
        raise KernelsUnavailable("switched off")

    return lambda: monkeypatch.setattr(function, "load", unavailable)


@pytest.fixture(params=["native", "general"])
def path(request: pytest.FixtureRequest, general_path: Callable[[], None]) -> str:
    name: str = request.param
    if name == "general":
        general_path()
    else:
        try:
            load()
        except KernelsUnavailable as error:
            pytest.skip(str(error))
    return name


def random_call(store: Store, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states [T, H], experts [T, k] and their weights [T, k]."""
    entry = store.manifest.layers[layer]
    generator = torch.Generator().manual_seed(layer)
    hidden = torch.randn(N_ROWS, entry.hidden_size, generator=generator)
    scores = torch.randn(N_ROWS, entry.num_experts, generator=generator)
    weight, index = scores.softmax(-1).topk(entry.top_k)
    return hidden, index, weight


def through_functions(
    store: Store, layer: int, call: tuple[Tensor, Tensor, Tensor], *, block: int, mode: OutputMode
) -> Tensor:
    """Return the sum of a layer's functions in float32, [T, H]."""
    hidden, index, weight = call
    total = torch.zeros(hidden.shape, dtype=torch.float32)
    for spec in block_specs(store, block):
        wanted = torch.isin(index, torch.tensor(spec.experts))
        if layer not in spec.layers or not wanted.any():
            continue
        rows, slots = wanted.nonzero(as_tuple=True)  # [P] each
        frame = encode_request(
            hidden.view(torch.uint8).numpy().tobytes(),
            dtype=WIRE_DTYPES[hidden.dtype],
            mode=mode,
            layer=layer,
            hidden_size=hidden.shape[1],
            n_rows=len(hidden),
            pair_row=rows.int().numpy(),
            pair_expert=index[rows, slots].int().numpy(),
            pair_weight=weight[rows, slots].numpy(),
        )
        output = ExpertFunction(spec, store).compute(decode_request(bytearray(b"".join(frame))))
        if mode is OutputMode.UNREDUCED:
            total.index_add_(0, rows, output.float())
        else:
            total += output.float()
    return total


def assert_equal(got: Tensor, expected: Tensor, path: str) -> None:
    """Assert that outputs differ by 1e-4 at most.

    The native kernels may round activations to 16 bits of a group's largest: that bounds the error
    over the norm; single elements may have up to twice as much.
    """
    if path == "general":
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
        return
    error = got - expected
    assert error.norm() <= 1e-4 * expected.norm()
    assert error.abs().max() <= 2e-4 * expected.abs().max()


@pytest.mark.parametrize("scheme", SCHEMES)
@families
def test_functions_equal_the_module_with_dequantised_weights(
    family: Family, scheme: str, path: str, prepared_store: PreparedStore
) -> None:
    store = prepared_store(family.name, experts=scheme)
    modules = list(experts_modules(upcast_model(family, store)).values())
    for layer in range(len(modules)):
        call = random_call(store, layer)
        with torch.no_grad():
            expected = modules[layer](*call)  # [T, H]
        for block in EXPERTS_PER_FUNCTION:
            for mode in OutputMode:
                got = through_functions(store, layer, call, block=block, mode=mode)
                assert_equal(got, expected, path)


@pytest.mark.parametrize("scheme", ["int8", "int4", "mxfp4"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v4"])
def test_bfloat16_outputs_are_the_exact_ones_rounded_once(
    name: str, scheme: str, path: str, prepared_store: PreparedStore
) -> None:
    family = next(f for f in FAMILIES if f.name == name)
    store = prepared_store(name, dtype="bfloat16", experts=scheme)
    modules = list(experts_modules(upcast_model(family, store)).values())
    hidden, index, weight = random_call(store, 0)
    call = hidden.bfloat16(), index, weight
    with torch.no_grad():
        expected = modules[0](call[0].float(), index, weight)
    n_experts = store.manifest.layers[0].num_experts
    got = through_functions(store, 0, call, block=n_experts, mode=OutputMode.REDUCED)
    bound = 1e-4 * expected.abs().max() + 1.01 * 2**-8 * expected.abs()
    assert bool(((got - expected).abs() <= bound).all())


@pytest.fixture(scope="module")
def sandboxes(sandbox: StartSandbox) -> Iterator[Sandboxes]:
    with ExitStack() as stack:
        yield tuple(stack.enter_context(sandbox(capacity=100, token="secret")) for _ in range(2))


@pytest.mark.parametrize("scheme", ["int8", "int4", "mxfp4"])
@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss", "deepseek_v4"])
def test_logits_equal_those_of_the_model_with_dequantised_weights(
    name: str, scheme: str, sandboxes: Sandboxes, prepared_store: PreparedStore
) -> None:
    """The router is quantised too: int8, or int4 with it."""
    family = next(f for f in FAMILIES if f.name == name)
    router = "int4" if scheme == "int4" else "int8"
    store = prepared_store(name, experts=scheme, router=router)
    assert store.manifest.router.quantized
    expected = forward_logits(family, upcast_model(family, store), prompts())  # [B, S, V]
    for block in EXPERTS_PER_FUNCTION:
        got = logits_through_functions(
            family, store, sandboxes, block=block, mode=OutputMode.REDUCED
        )  # [B, S, V]
        # Twice that of floats: native kernels round activations to 16 bits in every layer.
        assert (got - expected).abs().max() <= 2 * TOLERANCE
        assert torch.equal(got.argmax(-1), expected.argmax(-1))
