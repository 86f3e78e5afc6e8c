"""Shared memory regions: sealed, and opened only if created as a region."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from faasmoe_contracts.shared_region import SharedRegion

SIZE = 1 << 16


@pytest.fixture
def region() -> Iterator[SharedRegion]:
    region = SharedRegion.create(SIZE)
    yield region
    region.close_descriptor()


def test_processes_share_the_memory(region: SharedRegion) -> None:
    code = (
        "import sys; from faasmoe_contracts.shared_region import SharedRegion\n"
        "region = SharedRegion.open(*map(int, sys.argv[1:]))\n"
        "region.view[:5] = bytes(region.view[:5]).upper()"
    )
    region.view[:5] = b"hello"
    arguments = (os.getpid(), region.descriptor, SIZE)
    subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=True)
    assert bytes(region.view[:6]) == b"HELLO\0"


def test_size_is_sealed(region: SharedRegion) -> None:
    for size_bytes in (0, SIZE // 2, 2 * SIZE):
        with pytest.raises(PermissionError):
            os.ftruncate(region.descriptor, size_bytes)


def test_mapping_outlives_the_descriptor_without_leaks(region: SharedRegion) -> None:
    before = set(os.listdir("/proc/self/fd"))
    other = SharedRegion.open(os.getpid(), region.descriptor, SIZE)
    region.close_descriptor()
    region.close_descriptor()
    other.view[0] = 7
    assert region.view[0] == 7
    del other
    assert set(os.listdir("/proc/self/fd")) < before


@pytest.mark.parametrize("kind", ["pipe", "file", "unsealed", "other size", "none"])
def test_rejects_descriptors_that_are_not_sealed_memory_of_that_size(
    kind: str, region: SharedRegion, tmp_path: Path
) -> None:
    descriptors: dict[str, Callable[[], tuple[int, ...]]] = {
        "pipe": os.pipe,
        "file": lambda: (os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT),),
        "unsealed": lambda: (os.memfd_create("unsealed", os.MFD_ALLOW_SEALING),),
        "other size": lambda: (os.dup(region.descriptor),),
        "none": lambda: (),
    }
    opened = descriptors[kind]()
    try:
        if kind in ("file", "unsealed"):
            os.ftruncate(opened[0], SIZE)
        before = len(os.listdir("/proc/self/fd"))
        size_bytes = 2 * SIZE if kind == "other size" else SIZE
        with pytest.raises(OSError, match=r"sealed|No such|Invalid|not permitted"):
            SharedRegion.open(os.getpid(), opened[0] if opened else 1 << 20, size_bytes)
        assert len(os.listdir("/proc/self/fd")) == before
    finally:
        for descriptor in opened:
            os.close(descriptor)
