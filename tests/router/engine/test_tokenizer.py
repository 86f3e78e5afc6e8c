from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from faasmoe_router.engine.tokenizer import ChatTemplateOptions, ModelTokenizer
from faasmoe_router.errors import ChatTemplateError, RouterConfigError

MESSAGES = [{"role": "user", "content": "hi"}]


@given(text=st.text(max_size=40))
def test_detokenizer_restores_encoded_text(model_tokenizer: ModelTokenizer, text: str) -> None:
    detokenizer = model_tokenizer.new_detokenizer()
    pieces = [detokenizer.feed(token) for token in model_tokenizer.encode(text)]
    assert "".join(pieces) == text
    assert detokenizer.flush() == ""


@given(ids=st.lists(st.integers(0, 300), max_size=40))
def test_detokenizer_matches_decode_for_any_tokens(
    model_tokenizer: ModelTokenizer, ids: list[int]
) -> None:
    detokenizer = model_tokenizer.new_detokenizer()
    text = "".join(detokenizer.feed(token) for token in ids) + detokenizer.flush()
    assert text == model_tokenizer.decode(ids)


def test_detokenizer_holds_back_incomplete_characters(model_tokenizer: ModelTokenizer) -> None:
    detokenizer = model_tokenizer.new_detokenizer()
    ids = model_tokenizer.encode("日")
    assert [detokenizer.feed(token) for token in ids] == [*[""] * (len(ids) - 1), "日"]


def test_encoded_chat_ends_with_the_generation_prompt(
    model_tokenizer: ModelTokenizer, tokenizer: Any
) -> None:
    ids = model_tokenizer.encode_chat(MESSAGES)
    expected = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
    assert ids == expected
    assert tokenizer.decode(ids).endswith("<|im_start|>assistant\n")


def test_special_tokens_are_added_to_a_chat_on_request(tokenizer: Any) -> None:
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    with_bos = ModelTokenizer(
        PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=tokenizer.chat_template)
    )
    plain = with_bos.encode_chat(MESSAGES)
    options = ChatTemplateOptions(add_special_tokens=True)
    assert with_bos.encode_chat(MESSAGES, options) == [1, *plain]
    assert with_bos.encode("hi") == [1, *with_bos.encode("hi", add_special_tokens=False)]


def test_encode_chat_fails_without_a_chat_template(tokenizer: Any) -> None:
    backend = tokenizer.backend_tokenizer
    without_template = ModelTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    with pytest.raises(ChatTemplateError, match="no chat template"):
        without_template.encode_chat(MESSAGES)


@pytest.mark.parametrize(
    "template", [None, "{{ messages[0]['content'] }}", "{% broken", "{{ raise_exception('no') }}"]
)
def test_any_template_is_compiled_ahead(tokenizer: Any, template: str | None) -> None:
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    other = ModelTokenizer(
        PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template)
    )
    other.compile_template()  # what is wrong with it is a conversation's error
    if template == "{{ messages[0]['content'] }}":
        assert other.encode_chat(MESSAGES) == other.encode("hi")
        return
    with pytest.raises(ChatTemplateError):
        other.encode_chat(MESSAGES)


def test_chat_template_error_contains_its_reason(model_tokenizer: ModelTokenizer) -> None:
    with pytest.raises(ChatTemplateError, match="no tools here"):
        model_tokenizer.encode_chat([{"role": "tool", "content": "42"}])


def test_rejects_tokenizer_without_backend() -> None:
    with pytest.raises(RouterConfigError, match="tokenizer: got object"):
        ModelTokenizer(object())
