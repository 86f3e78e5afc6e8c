"""Fast imports; each test runs in a process of its own, since an import cannot be undone."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families.registry import FAMILIES, forward_logits

from faasmoe_transformers import fast_import

PREAMBLE = """
import sys
from faasmoe_transformers.fast_import import prepare_fast_import
from faasmoe_transformers.lazy_import import META_REGISTRATIONS, is_deferred
prepare_fast_import()
"""
FAMILY_SAMPLE = ("qwen2_moe", "gpt_oss", "deepseek_v3", "qwen3_next", "jamba")
TOKENS = list(range(3, 15))


def run(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + script, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_router_imports_none_of_what_it_does_not_use() -> None:
    script = """
from faasmoe_transformers.version_check import ROUTER_MODULES, check_private_names
check_private_names(ROUTER_MODULES)
import faasmoe_router.process
from transformers.models.qwen2_moe import modeling_qwen2_moe
assert is_deferred("torch._dynamo") and is_deferred(META_REGISTRATIONS)
print([name for name in sys.argv[1:] if name in sys.modules])
"""
    unused = ("sympy", "torch.distributed.tensor", "torch.distributed.fsdp", "torch._inductor")
    heavy = ("torch._decomp.decompositions", "torch.fx.experimental.symbolic_shapes", "kubernetes")
    assert run(script, *unused, *heavy) == "[]\n"


def test_families_compute_the_same_as_with_ordinary_imports() -> None:
    script = f"""
import json
import torch
import torch._prims.rng_prims  # for the generators with which the tiny models are made
from families.registry import FAMILIES, forward_logits
tokens = torch.tensor([{TOKENS}])
models = {{family.name: family for family in FAMILIES if family.name in {FAMILY_SAMPLE}}}
print(json.dumps({{
    name: forward_logits(family, family.build(), tokens).double().sum((0, 1)).tolist()
    for name, family in models.items()
}}))
assert is_deferred("torch._dynamo")
"""
    tests = str(Path(__file__).parents[1] / "integration")
    logits = json.loads(run(f"sys.path.insert(0, {tests!r})\n" + script).splitlines()[-1])
    assert set(logits) == set(FAMILY_SAMPLE)
    for family in FAMILIES:
        if family.name in FAMILY_SAMPLE:
            expected = forward_logits(family, family.build(), torch.tensor([TOKENS]))
            torch.testing.assert_close(
                torch.tensor(logits[family.name], dtype=torch.float64),
                expected.double().sum((0, 1)),
                rtol=1e-5,
                atol=1e-5,
            )


def test_compiler_is_loaded_on_first_use_and_learns_the_marks() -> None:
    script = """
import torch
static = torch.zeros(3)
torch._dynamo.mark_static_address(static, False)

@torch._dynamo.allow_in_graph
def opaque(x):
    return x + 1

@torch.compiler.disable
def disabled(x):
    return x * 2

@torch.compiler.disable(recursive=False)
def shallow(x):
    return x * 3

x = torch.arange(3.0)
assert disabled(opaque(x)).tolist() == [2.0, 4.0, 6.0]
assert shallow(x).tolist() == [0.0, 3.0, 6.0]
assert is_deferred("torch._dynamo")
graphs = []

def backend(graph, _):
    graphs.append(graph.print_readable(print_output=False))
    return graph

compiled = torch.compile(lambda x: disabled(opaque(x)) - 1, backend=backend)
assert compiled(x).tolist() == [1.0, 3.0, 5.0]
assert not is_deferred("torch._dynamo") and not is_deferred(META_REGISTRATIONS)
assert static._dynamo_static_input_type == "unguarded"
assert "opaque" in graphs[0]
assert not any("* 2" in graph for graph in graphs), graphs
assert compiled(x).tolist() == [1.0, 3.0, 5.0]
"""
    run(script)


def test_importing_a_submodule_of_the_compiler_loads_it() -> None:
    script = """
import torch
import torch._dynamo.testing
assert not is_deferred("torch._dynamo")
assert torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(2)).tolist() == [1.0, 1.0]
"""
    run(script)


def test_exported_names_are_those_of_an_ordinary_import() -> None:
    script = """
import transformers
print(sorted(transformers._import_structure), sorted(transformers.models._import_structure))
"""
    ordinary = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert run(script) == ordinary.stdout


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "__pycache__" / fast_import.CACHE_NAME
    monkeypatch.setattr(fast_import, "_cache_path", lambda _: path)
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    return path


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "transformers" / "models"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("__version__ = '1'")
    return folder


STRUCTURE: fast_import.ImportStructure = {
    frozenset({"torch"}): {"a.modeling_a": {"A", "AForCausalLM"}},
    frozenset(): {"a.configuration_a": {"AConfig"}},
}


def read_or_compute(models: Path) -> tuple[fast_import.ImportStructure, int]:
    """Return the structure and how often it was computed."""
    calls = []

    def compute() -> fast_import.ImportStructure:
        calls.append(1)
        return STRUCTURE

    return fast_import._read_or_compute(models, compute), len(calls)


def test_structure_is_computed_once_per_installation(cache: Path, models: Path) -> None:
    assert read_or_compute(models) == (STRUCTURE, 1)
    assert read_or_compute(models) == (STRUCTURE, 0)
    (models.parent / "__init__.py").write_text("__version__ = '1.1'")
    assert read_or_compute(models) == (STRUCTURE, 1)


def test_two_installations_have_a_cache_each(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast_import, "__file__", str(tmp_path / "fast_import.py"))
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    other = tmp_path / "other" / "transformers" / "models"
    shutil.copytree(models.parent, other.parent)
    assert [read_or_compute(m)[1] for m in (models, other, models, other)] == [1, 1, 0, 0]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"installation": 1, "structure": []}', '"\xff"']
)
def test_damaged_cache_is_computed_again(cache: Path, models: Path, content: str) -> None:
    cache.parent.mkdir()
    cache.write_text(content, encoding="latin-1")
    assert read_or_compute(models) == (STRUCTURE, 1)
    assert read_or_compute(models) == (STRUCTURE, 0)


def test_nothing_is_cached_without_bytecode_or_where_it_cannot_be_written(
    cache: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    assert read_or_compute(models) == (STRUCTURE, 1)
    assert not cache.exists()
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    cache.parent.write_text("a file in place of the folder")
    assert read_or_compute(models) == (STRUCTURE, 1)
