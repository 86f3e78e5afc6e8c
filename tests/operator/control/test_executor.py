import itertools

from faasmoe_operator.control.executor import (
    CORRUPTED_INITIAL_BACKOFF_S,
    CORRUPTED_MAX_BACKOFF_S,
    CorruptedFunctionBackoff,
)


def test_corrupted_function_backs_off_exponentially() -> None:
    backoff, now, times = CorruptedFunctionBackoff(), 0.0, []
    while now < 1000:
        if not backoff.is_backing_off("f0", now):
            times.append(now)
            backoff.record_failure("f0", now)
        now += 0.5
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert gaps[0] == CORRUPTED_INITIAL_BACKOFF_S
    assert gaps[-1] == CORRUPTED_MAX_BACKOFF_S
    assert gaps == sorted(gaps)
    assert not backoff.is_backing_off("f1", 0.0)
    backoff.record_success("f0")
    assert not backoff.is_backing_off("f0", now)
