"""Deferred imports; each test runs in a process of its own, since an import cannot be undone."""

import subprocess
import sys

import pytest

PREAMBLE = """
import sys
from faasmoe_transformers.lazy_import import META_REGISTRATIONS, defer_import, load_deferred
defer_import(META_REGISTRATIONS)
import torch
import faasmoe_expert.server.server
is_executed = lambda: "torch._decomp.decompositions" in sys.modules
assert not is_executed()
"""


def run(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_sandbox_computes_without_executing_the_deferred_module() -> None:
    script = """
import inspect
inspect.getmodule(torch.nn.functional.silu)  # visits every imported module
x = torch.ones(3, 4).bfloat16()
assert torch.nn.functional.linear(torch.nn.functional.silu(x), torch.ones(2, 4).bfloat16()).shape
print(is_executed())
"""
    assert run(script) == "False\n"


@pytest.mark.parametrize(
    "access",
    [
        "load_deferred(META_REGISTRATIONS)",
        "load_deferred(META_REGISTRATIONS); load_deferred(META_REGISTRATIONS)",
        "M.meta_index_select",
        "dir(M.aten)",
    ],
)
def test_deferred_module_is_executed_on_first_access(access: str) -> None:
    script = f"""
M = sys.modules["torch._meta_registrations"]
{access}
assert M.meta_index_select is vars(M)["meta_index_select"]
x = torch.ones(3, 4, device="meta")
assert torch.index_select(x, 0, torch.ones(2, dtype=torch.int64, device="meta")).shape == (2, 4)
print(is_executed())
"""
    assert run(script) == "True\n"


def test_missing_attribute_of_a_deferred_module_raises() -> None:
    script = """
M = sys.modules["torch._meta_registrations"]
assert not hasattr(M, "__no_such_name__")
assert not is_executed()
assert not hasattr(M, "no_such_name")
assert is_executed()
assert not hasattr(M, "no_such_name")
"""
    assert run(script) == ""


def test_modules_are_not_deferred_unless_requested() -> None:
    script = """
import sys
import torch
from faasmoe_transformers.lazy_import import META_REGISTRATIONS, load_deferred
load_deferred(META_REGISTRATIONS)
assert "torch._decomp.decompositions" in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)
