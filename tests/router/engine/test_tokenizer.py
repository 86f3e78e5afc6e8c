from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from faasmoe_router.engine.tokenizer import ModelTokenizer
from faasmoe_router.errors import ChatTemplateError, RouterConfigError

MESSAGES = [{"role": "user", "content": "hi"}]


@given(text=st.text(max_size=40))
def test_text_comes_back_in_whole_characters(codec: ModelTokenizer, text: str) -> None:
    detokenizer = codec.new_detokenizer()
    pieces = [detokenizer.feed(token) for token in codec.encode(text)]
    assert "".join(pieces) == text
    assert detokenizer.flush() == ""


@given(ids=st.lists(st.integers(0, 300), max_size=40))
def test_any_tokens_come_back_as_the_tokenizer_decodes_them(
    codec: ModelTokenizer, ids: list[int]
) -> None:
    detokenizer = codec.new_detokenizer()
    text = "".join(detokenizer.feed(token) for token in ids) + detokenizer.flush()
    assert text == codec.decode(ids)


def test_a_character_is_held_until_it_is_whole(codec: ModelTokenizer) -> None:
    detokenizer = codec.new_detokenizer()
    ids = codec.encode("日")
    assert [detokenizer.feed(token) for token in ids] == [*[""] * (len(ids) - 1), "日"]


def test_a_chat_ends_where_the_assistant_begins(codec: ModelTokenizer, tokenizer: Any) -> None:
    ids = codec.encode_chat(MESSAGES)
    expected = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
    assert ids == expected
    assert tokenizer.decode(ids).endswith("<|im_start|>assistant\n")


def test_a_model_without_a_template_refuses_chats(tokenizer: Any) -> None:
    bare = ModelTokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer))
    with pytest.raises(ChatTemplateError, match="no chat template"):
        bare.encode_chat(MESSAGES)


def test_a_template_that_refuses_says_why(codec: ModelTokenizer) -> None:
    with pytest.raises(ChatTemplateError, match="no tools here"):
        codec.encode_chat([{"role": "tool", "content": "42"}])


def test_a_tokenizer_without_a_backend_is_refused() -> None:
    with pytest.raises(RouterConfigError, match="tokenizer: got object"):
        ModelTokenizer(object())
