"""Attention over a paged cache equals torch's over the keys gathered from it."""

import itertools

import pytest
import torch
from torch import Tensor

from faasmoe_kernels import KernelDtype, KernelError, KernelLibrary
from faasmoe_kernels.router_ops import Attention, AttentionBatch, PagedAttention

N_SLOTS = 512
CACHE_DTYPES = {
    KernelDtype.FLOAT32: torch.float32,
    KernelDtype.BFLOAT16: torch.bfloat16,
    KernelDtype.FLOAT16: torch.float16,
}
BATCHES = [  # (query rows, cached keys) of each request
    [(1, 0)],
    [(1, 130)],
    [(5, 0), (1, 70), (17, 3), (1, 63), (1, 64)],
    [(70, 65)],
]


class Case:
    """A random batch, with the cache that it reads and writes."""

    def __init__(
        self,
        requests: list[tuple[int, int]],
        heads: tuple[int, int],
        head_dim: int,
        dtype: torch.dtype,
    ) -> None:
        torch.manual_seed(0)
        n_heads, n_kv_heads = heads
        rows = sum(n for n, _ in requests)
        self.requests, self.heads, self.head_dim = requests, heads, head_dim
        self.queries = torch.randn(rows, n_heads, head_dim)  # [T, H, D]
        self.keys = torch.randn(rows, n_kv_heads, head_dim)  # [T, K, D]
        self.values = torch.randn(rows, n_kv_heads, head_dim)  # [T, K, D]
        self.k_cache = torch.randn(N_SLOTS, n_kv_heads, head_dim).to(dtype)
        self.v_cache = torch.randn(N_SLOTS, n_kv_heads, head_dim).to(dtype)
        slots = iter(torch.randperm(N_SLOTS).tolist())
        self.cached = [list(itertools.islice(slots, n)) for _, n in requests]
        self.written = [list(itertools.islice(slots, n)) for n, _ in requests]
        self.query_offsets = offsets([n for n, _ in requests])
        self.key_offsets = offsets([n + m for n, m in requests])
        read = [c + [N_SLOTS + 7] * len(w) for c, w in zip(self.cached, self.written, strict=True)]
        self.read_index = torch.tensor(
            [*itertools.chain(*read)]
        )  # slots of new tokens are not used
        self.write_index = torch.tensor([*itertools.chain(*self.written)])

    def run(
        self, library: KernelLibrary, n_threads: int = 2, **options: float | int | None
    ) -> Tensor:
        """Return the attention's output, [T, H, D]; the cache is written."""
        dtype = next(d for d, t in CACHE_DTYPES.items() if t is self.k_cache.dtype)
        attention = Attention(
            n_heads=self.heads[0],
            n_kv_heads=self.heads[1],
            head_dim=self.head_dim,
            n_slots=N_SLOTS,
            k_cache=self.k_cache.data_ptr(),
            v_cache=self.v_cache.data_ptr(),
            cache_dtype=dtype,
            scaling=self.head_dim**-0.5,
            **options,
        )
        batch = AttentionBatch(
            len(self.requests),
            self.query_offsets.data_ptr(),
            self.key_offsets.data_ptr(),
            self.read_index.data_ptr(),
            self.write_index.data_ptr(),
        )
        out = torch.full_like(self.queries, torch.nan)
        PagedAttention(library)(
            attention,
            batch,
            queries=self.queries.data_ptr(),
            query_stride=self.queries.stride(0),
            keys=self.keys.data_ptr(),
            key_stride=self.keys.stride(0),
            values=self.values.data_ptr(),
            value_stride=self.values.stride(0),
            out=out.data_ptr(),
            n_threads=n_threads,
        )
        return out

    def expected(
        self, window: int = 0, softcap: float = 0.0, sinks: Tensor | None = None
    ) -> Tensor:
        """Return the same by torch, [T, H, D]."""
        group = self.heads[0] // self.heads[1]
        outputs = []
        for i, (n, n_cached) in enumerate(self.requests):
            rows = slice(int(self.query_offsets[i]), int(self.query_offsets[i + 1]))
            keys = torch.cat([self.k_cache[self.cached[i]].double(), self.keys[rows].double()])
            values = torch.cat([self.v_cache[self.cached[i]].double(), self.values[rows].double()])
            keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))  # [N, H, D]
            scores = torch.einsum("qhd,khd->hqk", self.queries[rows].double(), keys)
            scores *= self.head_dim**-0.5
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            position = torch.arange(n)[:, None] + n_cached  # [Q, 1]
            key = torch.arange(n + n_cached)[None]  # [1, N]
            is_seen = key <= position
            if window:
                is_seen &= key > position - window
            scores.masked_fill_(~is_seen, -torch.inf)
            if sinks is not None:
                columns = sinks.double()[:, None, None].expand(-1, n, 1)
                scores = torch.cat([scores, columns], -1)  # [H, Q, N + 1]
            weights = scores.softmax(-1)[..., : n + n_cached]
            outputs.append(torch.einsum("hqk,khd->qhd", weights, values))
        return torch.cat(outputs)


def offsets(counts: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)


@pytest.mark.parametrize("requests", BATCHES, ids=str)
@pytest.mark.parametrize(
    ("heads", "head_dim"), [((9, 3), 64), ((4, 4), 8), ((8, 2), 20), ((16, 1), 128)]
)
@pytest.mark.parametrize("cache_dtype", KernelDtype)
def test_equals_torch(
    library: KernelLibrary,
    requests: list[tuple[int, int]],
    heads: tuple[int, int],
    head_dim: int,
    cache_dtype: KernelDtype,
) -> None:
    case = Case(requests, heads, head_dim, CACHE_DTYPES[cache_dtype])
    expected = case.expected()
    torch.testing.assert_close(case.run(library).double(), expected, atol=2e-5, rtol=0)
    written = [*itertools.chain(*case.written)]
    assert torch.equal(case.k_cache[written], case.keys.to(case.k_cache.dtype))
    assert torch.equal(case.v_cache[written], case.values.to(case.v_cache.dtype))


@pytest.mark.parametrize("requests", BATCHES, ids=str)
@pytest.mark.parametrize("window", [1, 3, 40, 1000])
def test_sliding_window(
    library: KernelLibrary, requests: list[tuple[int, int]], window: int
) -> None:
    case = Case(requests, (6, 2), 32, torch.float32)
    expected = case.expected(window=window)
    got = case.run(library, window=window).double()
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("requests", BATCHES, ids=str)
def test_sinks_and_softcap(library: KernelLibrary, requests: list[tuple[int, int]]) -> None:
    case = Case(requests, (6, 2), 32, torch.float32)
    sinks = torch.tensor([-1.0, 0.0, 3.0, 10.0, -30.0, 1.0])
    expected = case.expected(window=50, softcap=2.0, sinks=sinks)
    got = case.run(library, window=50, softcap=2.0, sinks=sinks.data_ptr()).double()
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)


def test_the_thread_count_changes_no_bit(library: KernelLibrary) -> None:
    outputs = [
        Case(BATCHES[2], (9, 3), 64, torch.float32).run(library, n_threads=n) for n in (1, 2, 4)
    ]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_slots_outside_the_cache_are_rejected(default_library: KernelLibrary) -> None:
    case = Case(BATCHES[1], (2, 1), 16, torch.float32)
    case.read_index[3] = N_SLOTS
    with pytest.raises(KernelError, match=rf"batch\.read_index: got slot {N_SLOTS}, expected 0 to"):
        case.run(default_library)
    case.read_index[3] = 0
    case.write_index[0] = -1
    with pytest.raises(KernelError, match=r"batch\.write_index: got slot -1"):
        case.run(default_library)
