"""Each test in a process of its own: what is imported stays imported."""

import subprocess
import sys

import pytest

BEGIN = """
import sys
from faasmoe_expert.lazy_import import META_KERNELS, defer_import, make_deferred
defer_import(META_KERNELS)
import torch
import faasmoe_expert.server.server
is_made = lambda: "torch._decomp.decompositions" in sys.modules
assert not is_made()
"""


def run(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_sandbox_computes_without_what_is_left_out() -> None:
    script = """
import inspect
inspect.getmodule(torch.nn.functional.silu)  # looks at every module there is
x = torch.ones(3, 4).bfloat16()
assert torch.nn.functional.linear(torch.nn.functional.silu(x), torch.ones(2, 4).bfloat16()).shape
print(is_made())
"""
    assert run(script) == "False\n"


@pytest.mark.parametrize(
    "look",
    [
        "make_deferred(META_KERNELS)",
        "make_deferred(META_KERNELS); make_deferred(META_KERNELS)",
        "M.meta_index_select",
        "dir(M.aten)",
    ],
)
def test_is_made_when_something_looks_into_it(look: str) -> None:
    script = f"""
M = sys.modules["torch._meta_registrations"]
{look}
assert M.meta_index_select is vars(M)["meta_index_select"]
x = torch.ones(3, 4, device="meta")
assert torch.index_select(x, 0, torch.ones(2, dtype=torch.int64, device="meta")).shape == (2, 4)
print(is_made())
"""
    assert run(script) == "True\n"


def test_an_attribute_that_is_not_there_is_said_to_be_missing() -> None:
    script = """
M = sys.modules["torch._meta_registrations"]
assert not hasattr(M, "__no_such_name__")
assert not is_made()
assert not hasattr(M, "no_such_name")
assert is_made()
assert not hasattr(M, "no_such_name")
"""
    assert run(script) == ""


def test_nothing_changes_for_a_process_that_does_not_ask_for_it() -> None:
    script = """
import sys
import torch
from faasmoe_expert.lazy_import import META_KERNELS, make_deferred
make_deferred(META_KERNELS)
assert "torch._decomp.decompositions" in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)
