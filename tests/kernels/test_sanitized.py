"""A build with AddressSanitizer and UndefinedBehaviorSanitizer takes random input."""

import os
import subprocess
from pathlib import Path

import pytest

import hatch_build

FOLDER = Path(__file__).parent
SOURCES = ("fuzz_main.cpp", "fuzz.cpp", "fuzz_calls.cpp")
CASES = 4000


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = hatch_build.find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path_factory.mktemp("sanitized") / "fuzz"
    hatch_build.build(
        compiler,
        program,
        extra_flags=hatch_build.SANITIZER_FLAGS,
        extra_isa_flags=hatch_build.SANITIZER_ISA_FLAGS,
        extra_sources=[FOLDER / name for name in SOURCES],
        shared=False,
    )
    return program


@pytest.mark.slow
@pytest.mark.timeout(1800)  # the build takes 6 minutes on two cores
@pytest.mark.parametrize("fuzzer", ["kernels", "calls"])
def test_random_input_trips_no_sanitizer(program: Path, fuzzer: str) -> None:
    seed = os.environ.get("FAASMOE_FUZZ_SEED", "1")
    result = subprocess.run(
        [str(program), fuzzer, seed, str(CASES)], capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{CASES} cases" in result.stdout
