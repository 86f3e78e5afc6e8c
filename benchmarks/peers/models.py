"""The benchmark's models: Qwen2-MoE checkpoints that FaaSMoE, llama.cpp and vLLM can all serve.

Every layer is MoE, the output head is its own matrix, and the biases of queries, keys and values
are present and zero: llama.cpp's converter knows no dense layers in this architecture, and vLLM
leaves missing biases uninitialised. Tokens that are not text of their own, such as parts of a
character, have a zero row in the head, which is never the highest score: llama.cpp sends nothing
before a character is complete, so that its tokens could not be timed. Weights are random, so only
speed and memory mean anything. `demo-checkpoint` is the demo model itself, with `demo`'s sizes.

`python -m benchmarks.peers.models FOLDER NAME` makes one checkpoint; needs torch.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.geometry import CheckpointGeometry, make_checkpoint, qwen_geometry, small_geometry

QWEN_LAYERS = 4
DEMO_LAYERS = 30
DEMO_VOCABULARY = 49_152  # SmolLM2's
DEMO_CHECKPOINT = "demo-checkpoint"
HEAD = "lm_head.weight"
COMPLETE_MARKER = ".complete-with-tokenizer"
GEOMETRIES = {
    "qwen": replace(qwen_geometry(QWEN_LAYERS), zero_biases=True),
    "demo": CheckpointGeometry(
        DEMO_LAYERS,
        DEMO_VOCABULARY,
        hidden=576,
        heads=9,
        kv_heads=3,
        experts=8,
        top_k=4,
        intermediate=96,
        shared_intermediate=768,
        zero_biases=True,
    ),
    "tiny": replace(small_geometry(), zero_biases=True),
}


def vocabulary(name: str) -> int:
    """Return a model's vocabulary size."""
    return GEOMETRIES["demo" if name == DEMO_CHECKPOINT else name].vocabulary


def function_counts(name: str, *, functions_per_layer: int, sandboxes: int) -> tuple[int, int]:
    """Return `expertsPerFunction` and `functionsPerSandbox` for these numbers in all."""
    geometry = GEOMETRIES["demo" if name == DEMO_CHECKPOINT else name]
    experts_per_function = -(-geometry.experts // functions_per_layer)
    functions = geometry.layers * -(-geometry.experts // experts_per_function)
    return experts_per_function, -(-functions // sandboxes)


def checkpoint_folder(folder: Path, name: str) -> Path:
    """Return the folder of a model's checkpoint below the benchmark's cache folder."""
    return folder / (name if name == DEMO_CHECKPOINT else GEOMETRIES[name].name)


def make_model(folder: Path, name: str) -> Path:
    """Make a model's checkpoint with its tokenizer, unless it exists; return its folder."""
    checkpoint = checkpoint_folder(folder, name)
    if name == DEMO_CHECKPOINT:
        from faasmoe_router.checkpoint.demo.build import make_demo_model

        return make_demo_model(checkpoint)
    if not (checkpoint / COMPLETE_MARKER).exists():
        make_checkpoint(GEOMETRIES[name], checkpoint)
        if name == "demo":
            _copy_demo_tokenizer(checkpoint)
        else:
            _write_tokenizer(GEOMETRIES[name].vocabulary, checkpoint)
        _silence_partial_tokens(checkpoint)
        (checkpoint / COMPLETE_MARKER).touch()
    return checkpoint


def _silence_partial_tokens(folder: Path) -> None:
    """Set the head's rows of tokens that are not text of their own to zero."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    special = set(tokenizer.all_special_ids)
    silent = [i for i, text in enumerate(texts) if not text or "\ufffd" in text or i in special]
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    path = folder / index["weight_map"][HEAD]
    tensors = load_file(path)
    tensors[HEAD][silent] = 0
    partial = path.with_suffix(".partial")  # the tensors may be mapped from the file itself
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.rename(path)


def _copy_demo_tokenizer(folder: Path) -> None:
    from transformers import AutoTokenizer

    from faasmoe_router.checkpoint.demo.build import gguf_path

    path = gguf_path()
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)


def _write_tokenizer(vocabulary: int, folder: Path) -> None:
    """Write a byte-level BPE tokenizer with one merge, padded with placeholder tokens.

    llama.cpp refuses a BPE tokenizer without merges.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]
    tokens += [f"<{number}>" for number in range(len(tokens), vocabulary)]
    vocabulary_ids = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary_ids, merges=[("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def main() -> int:
    """Make one checkpoint."""
    folder, name = sys.argv[1:]
    print(make_model(Path(folder), name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
