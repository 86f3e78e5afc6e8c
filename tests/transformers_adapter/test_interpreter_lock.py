"""Others give the interpreter's lock back as soon as a native call has returned."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faasmoe_transformers.interpreter_lock import NATIVE_INTERVAL_S, NativeSections

DEADLINE_S = 120.0
USUAL_S = 3000.0


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    usual_s = sys.getswitchinterval()
    yield
    sys.setswitchinterval(usual_s)


def is_interval(expected_s: float) -> bool:
    return sys.getswitchinterval() == pytest.approx(expected_s, rel=0.01)


def test_a_thread_that_computes_in_python_gives_the_lock_back_after_a_native_call() -> None:
    has_returned, is_computing = threading.Event(), threading.Event()

    def compute() -> None:
        end_s = time.monotonic() + DEADLINE_S
        is_computing.set()
        while not has_returned.is_set() and time.monotonic() < end_s:
            pass  # nothing here releases the lock by itself

    sections = NativeSections()
    thread = threading.Thread(target=compute)
    sys.setswitchinterval(USUAL_S)
    with sections.native():
        thread.start()
        is_computing.wait(DEADLINE_S)
        time.sleep(0.001)  # a native call that releases the lock
    has_returned.set()
    thread.join()
    assert is_interval(USUAL_S)


def test_python_within_a_native_call_has_the_usual_interval() -> None:
    sections = NativeSections()
    sys.setswitchinterval(0.002)

    def call() -> None:
        with sections.native():
            assert is_interval(NATIVE_INTERVAL_S)
            with sections.python():
                assert is_interval(0.002)
                raise ValueError("of a callback")

    with pytest.raises(ValueError, match="of a callback"):
        call()
    assert is_interval(0.002)


def test_a_shorter_usual_interval_stays() -> None:
    sys.setswitchinterval(NATIVE_INTERVAL_S / 10)
    with NativeSections().native():
        assert is_interval(NATIVE_INTERVAL_S / 10)


@given(st.lists(st.booleans(), max_size=12))
def test_the_usual_interval_is_back_once_no_native_call_runs(begins: list[bool]) -> None:
    sections, running = NativeSections(), []
    sys.setswitchinterval(0.002)
    for begin in begins:
        if begin:
            running.append(sections.native())
            running[-1].__enter__()
        elif running:
            running.pop(0).__exit__(None, None, None)  # those of other threads end in any order
        assert is_interval(NATIVE_INTERVAL_S if running else 0.002)
    while running:
        running.pop().__exit__(None, None, None)
    assert is_interval(0.002)
