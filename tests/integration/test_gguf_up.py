"""`faasmoe up` serves GGUF files: greedy texts are those of transformers with the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from faasmoe_up import running_up
from gguf_models import GGUF_FAMILIES, build_model, file_tensors, write_gguf
from openai import OpenAI
from tiny_chat import tiny_tokenizer

N_TOKENS = 24
PROMPT = "the quick brown fox jumps"
MOEMODEL = """
apiVersion: faasmoe.dev/v1alpha1
kind: MoEModel
metadata: {{name: gguf}}
spec:
  model: {{source: "file://{model}", dtype: float32}}
  store: {{path: "{store}"}}
  granularity: {{expertsPerFunction: 2, layersPerFunction: 1}}
  router: {{maxModelLen: 128, maxNumSeqs: 4}}
  experts: {{functionsPerSandbox: 4}}
"""


@pytest.mark.parametrize(
    ("architecture", "type_name"),
    [("qwen2moe", "Q8_0"), ("qwen3moe", "Q4_0"), ("gpt-oss", "MXFP4")],
)
def test_greedy_text_is_that_of_transformers(
    tmp_path: Path, architecture: str, type_name: str
) -> None:
    family = GGUF_FAMILIES[architecture]
    model = build_model(family)
    tensors = file_tensors(family, model, type_name)
    path = write_gguf(tmp_path / "model.gguf", family, model, tensors.blocks)
    model.load_state_dict(tensors.weights)
    tokenizer = tiny_tokenizer()
    inputs = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(
            **inputs, max_new_tokens=N_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
        )  # [1, T]
    expected = ids[0, inputs["input_ids"].shape[1] :].tolist()

    file = tmp_path / "model.yaml"
    file.write_text(MOEMODEL.format(model=path, store=tmp_path / "store"))
    with (
        running_up(file, tmp_path / "up.log") as up,
        OpenAI(base_url=f"{up.base_url}/v1", api_key="none", max_retries=0) as client,
    ):
        response = client.completions.create(
            model="gguf",
            prompt=PROMPT,
            max_tokens=N_TOKENS,
            temperature=0,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
    extra = response.choices[0].model_extra
    assert extra is not None
    assert extra["token_ids"] == expected
