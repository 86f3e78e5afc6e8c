"""Generates a random Qwen2-MoE checkpoint of a given geometry, and its store.

`python -m benchmarks.geometry FOLDER '{"layers": 4, …}'` writes both and prints their paths. The
default geometry is that of Qwen1.5-MoE-A2.7B with fewer layers. The vocabulary shrinks in the same
proportion, because a full-size output head over a few layers would take half of every step and hide
what is compared.

A random gate selects all experts equally often. With `skew` s, the gate of each layer prefers some:
the embeddings have one constant dimension, which the residual stream preserves, and the gate adds
-s σ log(rank) for it, where σ is the standard deviation of the gate's other scores and ranks are
drawn per layer. With 60 experts, top-4 and s = 0.5, a quarter of the experts gets two thirds of the
tokens, and a few of the 60 see none of 100 tokens, as in trained models (docs/evaluation.md).
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Generator, Tensor

FULL_LAYERS = 24
FULL_VOCABULARY = 151_936
MAX_POSITIONS = 4096
ITEM_BYTES = 2  # bfloat16
STANDARD_DEVIATION = 0.02
BIAS_DIMENSION_VALUE = 8.0  # embedding dimension 0 if the gate is skewed
LAYER_VARIANCE = 0.45  # variance that a layer adds to the residual stream / spread**4; measured
SEED = 0
COMPLETE_MARKER = ".complete"
_SIZES = (
    "layers",
    "vocabulary",
    "hidden",
    "heads",
    "experts",
    "top_k",
    "intermediate",
    "shared_intermediate",
)


@dataclass(frozen=True, slots=True)
class CheckpointGeometry:
    """Sizes of a Qwen2-MoE checkpoint and the skew of its gates.

    Attributes:
        kv_heads: heads of keys and values; 0 for as many as `heads`.
        zero_biases: whether the biases of queries, keys and values are zero instead of random.
    """

    layers: int
    vocabulary: int
    hidden: int = 2048
    heads: int = 16
    experts: int = 60
    top_k: int = 4
    intermediate: int = 1408
    shared_intermediate: int = 5632
    skew: float = 0.0
    kv_heads: int = 0
    zero_biases: bool = False

    @property
    def name(self) -> str:
        """Folder name, unique for the geometry."""
        name = "-".join(str(size) for field, size in asdict(self).items() if field in _SIZES)
        if self.skew:
            name += f"-skew{self.skew:g}"
        if self.kv_heads:
            name += f"-kv{self.kv_heads}"
        return f"{name}-zero-biases" if self.zero_biases else name

    @property
    def weight_bytes(self) -> int:
        """Size of all weights except those of the norms."""
        layer = sum(math.prod(shape) for _, shape in _layer_shapes(self))
        return ITEM_BYTES * (self.layers * layer + 2 * self.vocabulary * self.hidden)

    def gathered_bytes(self, tokens: int) -> int:
        """Bytes that `batched_mm` copies: gate and up projections for each token-expert pair."""
        return ITEM_BYTES * tokens * self.top_k * 2 * self.intermediate * self.hidden


def qwen_geometry(layers: int, *, skew: float = 0.0) -> CheckpointGeometry:
    """Return Qwen1.5-MoE-A2.7B's geometry with layers and vocabulary reduced proportionally."""
    vocabulary = math.ceil(FULL_VOCABULARY * layers / FULL_LAYERS / 64) * 64
    return CheckpointGeometry(layers, min(vocabulary, FULL_VOCABULARY), skew=skew)


def small_geometry() -> CheckpointGeometry:
    """Return a geometry that is generated and run in seconds."""
    return CheckpointGeometry(2, 512, 64, 4, 8, 2, 32, 64)


def make_checkpoint(geometry: CheckpointGeometry, folder: Path) -> None:
    """Write a checkpoint with one file per layer, unless it exists.

    The weights depend only on the geometry.
    """
    if (folder / COMPLETE_MARKER).exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _write_config(geometry, folder)
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(_generate_shards(geometry)):
        file = f"model-{number + 1:05}-of-{geometry.layers + 1:05}.safetensors"
        _save(tensors, folder / file)
        weight_map.update(dict.fromkeys(tensors, file))
        print(f"wrote {folder.name}/{file}", file=sys.stderr)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / COMPLETE_MARKER).touch()


def _write_config(geometry: CheckpointGeometry, folder: Path) -> None:
    from transformers import GenerationConfig, Qwen2MoeConfig

    config = Qwen2MoeConfig(
        vocab_size=geometry.vocabulary,
        hidden_size=geometry.hidden,
        intermediate_size=geometry.shared_intermediate,
        num_hidden_layers=geometry.layers,
        num_attention_heads=geometry.heads,
        num_key_value_heads=geometry.kv_heads or geometry.heads,
        max_position_embeddings=MAX_POSITIONS,
        moe_intermediate_size=geometry.intermediate,
        shared_expert_intermediate_size=geometry.shared_intermediate,
        num_experts_per_tok=geometry.top_k,
        num_experts=geometry.experts,
        architectures=["Qwen2MoeForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    GenerationConfig().save_pretrained(folder)


def _write_tokenizer(geometry: CheckpointGeometry, folder: Path) -> None:
    """Write a byte-level tokenizer, padded with placeholder tokens to the vocabulary size."""
    if (folder / "tokenizer.json").exists():
        return
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    others = [f"<{number}>" for number in range(len(characters), geometry.vocabulary)]
    vocabulary = {token: number for number, token in enumerate([*characters, *others])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def _generate_shards(geometry: CheckpointGeometry) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of one file at a time, so that only one needs to fit into memory."""
    import torch

    generator = torch.Generator().manual_seed(SEED)

    def draw(*shape: int) -> Tensor:
        empty = torch.empty(shape, dtype=torch.bfloat16)
        return empty.normal_(std=STANDARD_DEVIATION, generator=generator)

    ones = torch.ones(geometry.hidden, dtype=torch.bfloat16)  # [H]
    embeddings = draw(geometry.vocabulary, geometry.hidden)  # [V, H]
    if geometry.skew:
        embeddings /= (
            STANDARD_DEVIATION  # unit variance, so that the layers' outputs do not dominate
        )
        embeddings[:, 0] = BIAS_DIMENSION_VALUE
    yield {
        "model.embed_tokens.weight": embeddings,
        "model.norm.weight": ones,
        "lm_head.weight": draw(geometry.vocabulary, geometry.hidden),
    }
    shapes = dict(_layer_shapes(geometry))
    for layer in range(geometry.layers):
        tensors = {name: draw(*shape) for name, shape in shapes.items()}
        if geometry.zero_biases:
            tensors |= {name: torch.zeros_like(tensors[name]) for name in _bias_names()}
        tensors |= {f"{n}_layernorm.weight": ones.clone() for n in ("input", "post_attention")}
        if geometry.skew:
            tensors["mlp.gate.weight"][:, 0] = _gate_preferences(geometry, layer, generator)
        yield {f"model.layers.{layer}.{name}": tensor for name, tensor in tensors.items()}


def _gate_preferences(geometry: CheckpointGeometry, layer: int, generator: Generator) -> Tensor:
    """Return the gate's weights for the constant dimension, [E]."""
    import torch

    ranks = 1 + torch.randperm(geometry.experts, generator=generator)  # [E]
    spread = STANDARD_DEVIATION * math.sqrt(
        geometry.hidden
    )  # standard deviation of the other scores
    # The norm before the gate divides the constant by the root mean square of the residual stream.
    variance = (
        1 + BIAS_DIMENSION_VALUE**2 / geometry.hidden + LAYER_VARIANCE * spread**4 * (layer + 0.3)
    )
    return -geometry.skew * spread * ranks.log() * math.sqrt(variance) / BIAS_DIMENSION_VALUE


def _layer_shapes(geometry: CheckpointGeometry) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden = geometry.hidden
    kv_size = hidden // geometry.heads * (geometry.kv_heads or geometry.heads)
    for name, size in zip("qkvo", (hidden, kv_size, kv_size, hidden), strict=True):
        yield f"self_attn.{name}_proj.weight", (size, hidden)
    for name, size in zip(_bias_names(), (hidden, kv_size, kv_size), strict=True):
        yield name, (size,)
    yield "mlp.gate.weight", (geometry.experts, hidden)
    yield "mlp.shared_expert_gate.weight", (1, hidden)
    yield from _mlp_shapes("mlp.shared_expert", hidden, geometry.shared_intermediate)
    for expert in range(geometry.experts):
        yield from _mlp_shapes(f"mlp.experts.{expert}", hidden, geometry.intermediate)


def _bias_names() -> tuple[str, ...]:
    return tuple(f"self_attn.{name}_proj.bias" for name in "qkv")


def _mlp_shapes(
    prefix: str, hidden: int, intermediate: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}.gate_proj.weight", (intermediate, hidden)
    yield f"{prefix}.up_proj.weight", (intermediate, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, intermediate)


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"})


def _prepare(checkpoint: Path, store: Path) -> None:
    """Prepare the store unless a readable one exists."""
    from faasmoe_contracts.store import Store, StoreError
    from faasmoe_router.checkpoint.prepare import prepare

    try:
        Store.open(store)
    except StoreError as error:
        print(f"preparing {store.name}: {error}", file=sys.stderr)
        prepare(str(checkpoint), store, force=store.exists())


def make_model(geometry: CheckpointGeometry, folder: Path) -> tuple[Path, Path]:
    """Generate a checkpoint and its store in this process; needs torch.

    Returns:
        The folders of the checkpoint and of the store.
    """
    checkpoint, store = folder / geometry.name, folder / f"{geometry.name}-store"
    make_checkpoint(geometry, checkpoint)
    _prepare(checkpoint, store)
    for tokenizer_folder in (checkpoint, store / "model"):
        _write_tokenizer(geometry, tokenizer_folder)
    return checkpoint, store


def main() -> int:
    """Generate the checkpoint and its store; print both folders as JSON."""
    folder, geometry = Path(sys.argv[1]), CheckpointGeometry(**json.loads(sys.argv[2]))
    checkpoint, store = make_model(geometry, folder)
    print(json.dumps({"checkpoint": str(checkpoint), "store": str(store)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
