import pytest

from faasmoe_router.errors import RouterConfigError
from faasmoe_router.vllm_backend.compatibility import checkpoint_name, select_engine

SERVED, UNKNOWN, TESTED = "Qwen2MoeForCausalLM", "MuseSparkForConditionalGeneration", "0.32.1"


@pytest.mark.parametrize(
    ("setting", "architecture", "version", "expected"),
    [
        ("transformers", SERVED, TESTED, "transformers"),
        ("auto", SERVED, TESTED, "vllm"),
        ("auto", SERVED, None, "transformers"),
        ("auto", SERVED, "0.31.0", "transformers"),
        ("auto", UNKNOWN, TESTED, "transformers"),
        ("vllm", SERVED, TESTED, "vllm"),
    ],
)
def test_auto_takes_vllm_where_it_is_installed_and_serves_the_architecture(
    setting: str, architecture: str, version: str | None, expected: str
) -> None:
    assert select_engine(setting, architecture, version) == expected


@pytest.mark.parametrize(
    ("architecture", "version", "message"),
    [
        (SERVED, None, r"got no vllm in this environment, expected vllm 0\.32\.\*"),
        (SERVED, "0.33.0", r"got vllm 0\.33\.0, expected a tested version, 0\.32\.\*"),
        (SERVED, "unknown", "got vllm unknown, expected a tested version"),
        (UNKNOWN, TESTED, f"got the architecture {UNKNOWN}, expected one that is tested: Qwen2"),
    ],
)
def test_what_vllm_cannot_serve_is_refused_and_named(
    architecture: str, version: str | None, message: str
) -> None:
    with pytest.raises(RouterConfigError, match=f"^FAASMOE_ENGINE: {message}"):
        select_engine("vllm", architecture, version)


SMALL_HEADS = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": None}


def test_heads_that_attention_on_a_cpu_cannot_run_are_refused_and_named() -> None:
    message = (
        r"^FAASMOE_ENGINE: config\.json: hidden_size / num_attention_heads: got 16, expected a "
        r"size of attention heads that vLLM computes on a CPU: 32, 64, 80"
    )
    with pytest.raises(RouterConfigError, match=message):
        select_engine("vllm", SERVED, TESTED, cpu_config=SMALL_HEADS)
    with pytest.raises(RouterConfigError, match=r"config\.json: head_dim: got 48, expected a size"):
        select_engine("vllm", SERVED, TESTED, cpu_config=SMALL_HEADS | {"head_dim": 48})


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        pytest.param(None, "vllm", id="a GPU"),
        pytest.param(SMALL_HEADS, "transformers", id="small heads"),
        pytest.param(SMALL_HEADS | {"head_dim": 64}, "vllm", id="larger heads"),
        pytest.param(SMALL_HEADS | {"hidden_size": "64"}, "vllm", id="no number"),
        pytest.param(SMALL_HEADS | {"kv_lora_rank": 512}, "vllm", id="latent attention"),
        pytest.param({}, "vllm", id="unknown"),
    ],
)
def test_auto_takes_vllm_where_it_has_kernels_for_the_heads(
    config: dict[str, int] | None, expected: str
) -> None:
    assert select_engine("auto", SERVED, TESTED, cpu_config=config) == expected


def test_tensors_get_the_names_of_checkpoints() -> None:
    name = "model.layers.0.mlp.gate.weight"
    assert checkpoint_name(name, "Qwen2MoeForCausalLM") == name
    expected = "model.layers.0.block_sparse_moe.gate.weight"
    assert checkpoint_name(name, "MixtralForCausalLM") == expected
