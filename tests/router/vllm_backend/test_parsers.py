import json
from pathlib import Path

import pytest

from faasmoe_router.config import VllmArguments
from faasmoe_router.vllm_backend.parsers import Parsers, read_chat_templates, select_parsers

HERMES = "{% for tool in tools %}<tool_call>{% endfor %}"
KIMI = "<|tool_call_begin|>f<|tool_call_argument_begin|>{}"
DEEPSEEK = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>"


@pytest.mark.parametrize(
    ("architecture", "template", "expected"),
    [
        ("Qwen2MoeForCausalLM", "", Parsers(None, None)),
        ("Qwen2MoeForCausalLM", "{{ messages }}", Parsers("hermes", None)),
        ("Qwen2MoeForCausalLM", HERMES, Parsers("hermes", None)),
        ("Qwen3MoeForCausalLM", HERMES + "enable_thinking", Parsers("hermes", "qwen3")),
        (
            "Qwen3MoeForCausalLM",
            HERMES + r"'<|im_start|>assistant\n<think>\n'",
            Parsers("hermes", "deepseek_r1"),
        ),
        ("Qwen3MoeForCausalLM", HERMES + r"role + '\n<think>\n' + x", Parsers("hermes", None)),
        ("Qwen3MoeForCausalLM", "<tool_call><function=f>", Parsers("qwen3_coder", None)),
        ("MixtralForCausalLM", "[TOOL_CALLS]", Parsers("mistral", None)),
        ("Glm4MoeForCausalLM", "<think><arg_key>", Parsers("glm45", "glm45")),
        ("DeepseekV3ForCausalLM", KIMI, Parsers("kimi_k2", None)),
        ("DeepseekV3ForCausalLM", DEEPSEEK + "```json", Parsers("deepseek_v3", None)),
        (
            "DeepseekV3ForCausalLM",
            DEEPSEEK + "```json</think>",
            Parsers("deepseek_v3", "deepseek_r1"),
        ),
        (
            "DeepseekV3ForCausalLM",
            DEEPSEEK + "if thinking </think>",
            Parsers("deepseek_v31", "deepseek_v3"),
        ),
        ("GptOssForCausalLM", "", Parsers("openai", "openai_gptoss")),
        ("OlmoeForCausalLM", "{{ messages }}", Parsers("hermes", None)),
    ],
)
def test_family_and_chat_template_choose_the_parsers(
    architecture: str, template: str, expected: Parsers
) -> None:
    assert select_parsers(VllmArguments(), architecture, template) == expected


def test_settings_override_the_family() -> None:
    arguments = VllmArguments(tool_call_parser="xlam", reasoning_parser="none")
    chosen = select_parsers(arguments, "GptOssForCausalLM", "")
    assert chosen == Parsers("xlam", None)
    chosen = select_parsers(VllmArguments(tool_call_parser="none"), "Qwen2MoeForCausalLM", HERMES)
    assert chosen == Parsers(None, None)


def test_templates_are_read_from_its_file_or_from_the_tokenizers_config(tmp_path: Path) -> None:
    assert read_chat_templates(tmp_path) == ()
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "one"}))
    assert read_chat_templates(tmp_path) == ("one",)
    several = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    config.write_text(json.dumps({"chat_template": several}))
    assert read_chat_templates(tmp_path) == ("a", "b")
    (tmp_path / "chat_template.jinja").write_text("file")
    assert read_chat_templates(tmp_path) == ("file",)
