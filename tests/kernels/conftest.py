"""The kernel library with each instruction set of this machine."""

import platform
from collections.abc import Iterator

import numpy as np
import pytest

from faasmoe_kernels import KernelError, KernelLibrary, KernelsUnavailable, load

IS_ARM = platform.machine() in ("aarch64", "arm64")
ISAS = ("neon", "portable") if IS_ARM else ("avx512_bf16", "avx512", "avx2", "portable")


@pytest.fixture(scope="session")
def default_library() -> KernelLibrary:
    """The library; tests are skipped where it is not built."""
    try:
        return load()
    except KernelsUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(params=ISAS)
def library(
    request: pytest.FixtureRequest, default_library: KernelLibrary
) -> Iterator[KernelLibrary]:
    """The library with one instruction set."""
    default = default_library.isa
    try:
        default_library.use_isa(request.param)
    except KernelError as error:
        pytest.skip(str(error))
    yield default_library
    default_library.use_isa(default)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
