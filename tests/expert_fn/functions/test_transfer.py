"""Chunked uploads arrive complete, even if the device copies late."""

import pytest
import torch
from fake_copy_streams import DeferredCopyStream, FakeCopyStream
from hypothesis import given, settings
from hypothesis import strategies as st

from faasmoe_expert.functions.transfer import Uploader, uploader_for


def random_bytes(n_bytes: int, seed: int) -> bytearray:
    generator = torch.Generator().manual_seed(seed)
    return bytearray(torch.randint(256, (n_bytes,), generator=generator).to(torch.uint8).tolist())


@given(
    sizes=st.lists(st.integers(0, 70), min_size=1, max_size=5),
    chunk_bytes=st.integers(1, 32),
    n_buffers=st.integers(2, 4),
)
@settings(max_examples=80)
def test_every_byte_arrives_with_delayed_copies(
    sizes: list[int], chunk_bytes: int, n_buffers: int
) -> None:
    stream = DeferredCopyStream()
    uploader = Uploader(stream, chunk_bytes=chunk_bytes, n_buffers=n_buffers)
    sources = [random_bytes(size, seed) for seed, size in enumerate(sizes)]
    targets = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
    for target, source in zip(targets, sources, strict=True):
        uploader.upload(target, memoryview(source))
    uploader.synchronize()
    for target, source in zip(targets, sources, strict=True):
        assert bytes(target.tolist()) == bytes(source)
    assert stream.n_buffers <= n_buffers


def test_reads_the_next_chunk_while_the_device_copies() -> None:
    stream = DeferredCopyStream()
    uploader = Uploader(stream, chunk_bytes=8, n_buffers=2)
    uploader.upload(torch.zeros(64, dtype=torch.uint8), memoryview(random_bytes(64, 0)))
    assert stream.max_pending == 2
    uploader.synchronize()


def test_reuses_buffers_across_uploads() -> None:
    stream = DeferredCopyStream()
    uploader = Uploader(stream, chunk_bytes=8)
    for seed in range(5):
        uploader.upload(torch.zeros(64, dtype=torch.uint8), memoryview(random_bytes(64, seed)))
        uploader.synchronize()
    assert stream.n_buffers == 2


def test_cpu_needs_no_uploader() -> None:
    assert uploader_for(torch.device("cpu")) is None


def test_exposes_its_device() -> None:
    assert Uploader(FakeCopyStream()).device == torch.device("cpu")


@pytest.mark.parametrize("n_bytes", [8, 16])
def test_copies_no_empty_chunk(n_bytes: int) -> None:
    stream = DeferredCopyStream()
    uploader = Uploader(stream, chunk_bytes=8, n_buffers=4)
    uploader.upload(torch.zeros(n_bytes, dtype=torch.uint8), memoryview(random_bytes(n_bytes, 0)))
    assert stream.max_pending == n_bytes // 8
