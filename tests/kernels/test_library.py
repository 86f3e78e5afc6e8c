"""Building and loading the library: without a compiler, switched off, of another version."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import hatch_build
from faasmoe_kernels import (
    ABI_VERSION,
    KernelLibrary,
    KernelsUnavailable,
    describe_cpu_kernels,
    load,
)

FORK_TEST = """
import os, sys
import numpy as np
from faasmoe_kernels import KernelDtype, Matrix, Scheme, load

weight = np.arange(256 * 64, dtype=np.float32).reshape(256, 64) / 1e4
x = np.ones((3, 64), dtype=np.float32)

def product():
    out = np.empty((3, 256), dtype=np.float32)
    load().linear(
        Matrix(Scheme.FLOAT32, 256, 64, weight.ctypes.data),
        x=x.ctypes.data, x_dtype=KernelDtype.FLOAT32, x_stride=64, rows=3,
        out=out.ctypes.data, out_dtype=KernelDtype.FLOAT32, n_threads=4,
    )
    return out

def threads():
    return len(os.listdir("/proc/self/task"))

before = threads()
expected = product()
assert threads() == before + 3, threads()  # the pool of this process
for _ in range(20):
    pid = os.fork()
    if pid == 0:
        ok = threads() == 1 and (product() == expected).all() and threads() == 4
        os._exit(0 if ok else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert (product() == expected).all()
assert threads() == before + 3, threads()
"""


@pytest.fixture
def fresh_load() -> Iterator[None]:
    """Lets `load` look again, in the test and after it."""
    load.cache_clear()
    yield
    load.cache_clear()


def compile_library(tmp_path: Path, source: str) -> Path:
    compiler = hatch_build.find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    (tmp_path / "fake.cpp").write_text(source)
    target = tmp_path / "libfake.so"
    command = [compiler, "-shared", "-fPIC", str(tmp_path / "fake.cpp"), "-o", str(target)]
    subprocess.run(command, check=True)
    return target


@pytest.mark.usefixtures("fresh_load")
def test_the_environment_switches_the_library_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAASMOE_KERNELS", "off")
    assert describe_cpu_kernels() == "torch (switched off by FAASMOE_KERNELS=off)"
    with pytest.raises(KernelsUnavailable, match="FAASMOE_KERNELS=off"):
        load()


@pytest.mark.usefixtures("fresh_load")
@pytest.mark.parametrize("setting", ["avx2", "0", "of"])
def test_an_unknown_setting_is_reported_and_torch_computes(
    monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    monkeypatch.setenv("FAASMOE_KERNELS", setting)
    expected = f"torch (FAASMOE_KERNELS: got '{setting}', expected on or off)"
    assert describe_cpu_kernels() == expected


@pytest.mark.usefixtures("fresh_load")
@pytest.mark.parametrize("setting", ["", "on", "ON"])
def test_the_library_is_used_unless_it_is_switched_off(
    monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    monkeypatch.setenv("FAASMOE_KERNELS", setting)
    assert "FAASMOE_KERNELS" not in describe_cpu_kernels()


@pytest.mark.usefixtures("fresh_load")
def test_the_environment_names_the_instruction_set(
    library: KernelLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = library.isa
    monkeypatch.setenv("FAASMOE_KERNELS_ISA", "portable")
    try:
        assert describe_cpu_kernels() == "native (portable)"
    finally:
        library.use_isa(best)


@pytest.mark.usefixtures("fresh_load")
def test_an_unknown_instruction_set_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAASMOE_KERNELS_ISA", "sse9")
    assert describe_cpu_kernels().startswith('torch (FAASMOE_KERNELS_ISA: isa: got "sse9"')


def test_a_library_of_another_version_is_refused(tmp_path: Path) -> None:
    path = compile_library(tmp_path, 'extern "C" int fk_abi_version() { return 99; }')
    with pytest.raises(
        KernelsUnavailable, match=f"got a library of ABI version 99, expected {ABI_VERSION}"
    ):
        KernelLibrary(path)


def test_another_library_is_refused(tmp_path: Path) -> None:
    path = compile_library(tmp_path, "int unrelated;")
    with pytest.raises(KernelsUnavailable, match="not a kernel library"):
        KernelLibrary(path)


def test_a_file_that_is_no_library_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "libtext.so"
    path.write_text("text")
    with pytest.raises(KernelsUnavailable, match=r"libtext\.so"):
        KernelLibrary(path)


@pytest.mark.usefixtures("default_library")
def test_threads_work_before_and_after_forks() -> None:
    """Every process has a pool of its own, started by its first call with threads."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", FORK_TEST], check=True, timeout=120, env=environment)


def test_nothing_is_built_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hatch_build, "LIBRARY", tmp_path / "libfaasmoe_kernels.so")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not hatch_build.build_if_possible()
    message = capsys.readouterr().err
    assert message.startswith("faasmoe_kernels: no C++ compiler")
    assert message.count("\n") == 1


def test_a_compiler_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hatch_build, "LIBRARY", tmp_path / "libfaasmoe_kernels.so")
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(subprocess.CalledProcessError):
        hatch_build.build_if_possible()


def test_the_library_is_built_again_after_its_sources_change(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    library = tmp_path / "libfaasmoe_kernels.so"
    monkeypatch.setattr(hatch_build, "LIBRARY", library)
    assert not hatch_build.is_up_to_date()
    library.touch()
    assert hatch_build.is_up_to_date()
    os.utime(library, (0, 0))
    assert not hatch_build.is_up_to_date()
