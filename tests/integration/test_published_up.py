"""`faasmoe up` serves published codes, whatever computes the router: texts are transformers'."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from faasmoe_up import running_up
from openai import OpenAI
from published.checkpoints import build, publish
from published.floats import fp8_blocks
from tiny_chat import tiny_tokenizer

N_TOKENS = 16
PROMPT = "the quick brown fox jumps"
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
MOEMODEL = """
apiVersion: faasmoe.dev/v1alpha1
kind: MoEModel
metadata: {{name: published}}
spec:
  model: {{source: "file://{model}"}}
  store: {{path: "{store}", mode: reference}}
  granularity: {{expertsPerFunction: 3, layersPerFunction: 1}}
  router: {{maxModelLen: 128, maxNumSeqs: 4, compute: {compute}}}
  experts: {{functionsPerSandbox: 4}}
"""


def expected_tokens(reference: Path) -> list[int]:
    """Return transformers' greedy tokens with the weights that the writer meant."""
    model_class = transformers.Qwen3MoeForCausalLM
    model = model_class.from_pretrained(reference, dtype=torch.float32).eval()
    inputs = tiny_tokenizer()(PROMPT, return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(
            **inputs, max_new_tokens=N_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
        )  # [1, T]
    tokens: list[int] = ids[0, inputs["input_ids"].shape[1] :].tolist()
    return tokens


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compute", ["auto", "modules", "torch"])
def test_greedy_tokens_are_those_of_transformers(compute: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model = build("qwen3_moe", vocab_size=len(tokenizer), max_position_embeddings=128)
    checkpoint = publish(model, tmp_path, fp8_blocks(block=32), FP8, dtype=torch.float32)
    tokenizer.save_pretrained(checkpoint.folder)
    file = tmp_path / "model.yaml"
    store = tmp_path / "store"
    file.write_text(MOEMODEL.format(model=checkpoint.folder, store=store, compute=compute))
    with (
        running_up(file, tmp_path / "up.log") as up,
        OpenAI(base_url=f"{up.base_url}/v1", api_key="none", max_retries=0) as client,
    ):
        response = client.completions.create(
            model="published",
            prompt=PROMPT,
            max_tokens=N_TOKENS,
            temperature=0,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
    extra = response.choices[0].model_extra
    assert extra is not None
    assert extra["token_ids"] == expected_tokens(checkpoint.reference)
    manifest = json.loads((store / "manifest.json").read_text())
    assert not any("file" in layer for layer in manifest["layers"])
    schemes = {e["scheme"] for layer in manifest["layers"] for e in layer["quantization"].values()}
    assert schemes == {"fp8"}
