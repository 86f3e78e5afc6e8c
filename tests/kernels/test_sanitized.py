"""A build with AddressSanitizer and UndefinedBehaviorSanitizer takes random input."""

import os
import subprocess
from pathlib import Path

import pytest

import hatch_build

FOLDER = Path(__file__).parent
CASES = 4000


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("driver", ["fuzz.cpp", "fuzz_calls.cpp"])
def test_random_input_trips_no_sanitizer(driver: str, tmp_path: Path) -> None:
    compiler = hatch_build.find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path / "fuzz"
    hatch_build.build(
        compiler,
        program,
        extra_flags=hatch_build.SANITIZER_FLAGS,
        extra_sources=[FOLDER / driver],
        shared=False,
    )
    seed = os.environ.get("FAASMOE_FUZZ_SEED", "1")
    result = subprocess.run(
        [str(program), seed, str(CASES)], capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{CASES} cases" in result.stdout
