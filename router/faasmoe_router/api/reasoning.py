"""Reasoning of one chat request: whether and how the model writes it, told by its chat template."""

from collections.abc import Sequence
from dataclasses import dataclass

from faasmoe_router.api.protocol import ChatCompletionRequest
from faasmoe_router.api.tool_calling import ToolCallConfig
from faasmoe_router.engine.tokenizer import ModelTokenizer
from faasmoe_router.toolcalls.harmony import CHANNEL_MARKER, HarmonyParser
from faasmoe_router.toolcalls.message import AnyMessageParser, MessageParser
from faasmoe_router.toolcalls.reasoning import (
    ReasoningFormat,
    ReasoningParser,
    detect_reasoning_format,
)

N_PROMPT_TOKENS_SEARCHED = 16  # at the end of a prompt, for the mark that opens reasoning


@dataclass(frozen=True, slots=True)
class MessageFormat:
    """How the message of one chat is parsed.

    Attributes:
        reasoning_format: how reasoning is marked; None if the model has none.
        is_open: whether the prompt opens reasoning that the text continues.
        is_harmony: whether the text consists of messages of harmony.
        tool_config: how the model calls tools; None if it may not.
        includes_reasoning: whether the response has the reasoning.
    """

    reasoning_format: ReasoningFormat | None = None
    is_open: bool = False
    is_harmony: bool = False
    tool_config: ToolCallConfig | None = None
    includes_reasoning: bool = True

    @property
    def is_plain(self) -> bool:
        """Whether the whole text is content."""
        return self.reasoning_format is None and not self.is_harmony and self.tool_config is None

    @property
    def has_reasoning(self) -> bool:
        """Whether a text may have reasoning."""
        return self.reasoning_format is not None or self.is_harmony

    def new_parser(self) -> AnyMessageParser:
        """Return a parser for the text of one choice."""
        config = self.tool_config
        if self.is_harmony:
            return HarmonyParser(parallel=config is None or config.is_parallel)
        reasoning = None
        if self.reasoning_format is not None:
            reasoning = ReasoningParser(self.reasoning_format, is_open=self.is_open)
        return MessageParser(reasoning, None if config is None else config.new_parser())


def needs_special_tokens(tokenizer: ModelTokenizer) -> bool:
    """Return whether the marks of a model's reasoning are special tokens."""
    template = tokenizer.tool_chat_template
    reasoning_format = detect_reasoning_format(template)
    return CHANNEL_MARKER in template or (
        reasoning_format is not None
        and tokenizer.special_token_id(reasoning_format.end_marker) is not None
    )


def resolve_message_format(
    body: ChatCompletionRequest,
    tokenizer: ModelTokenizer,
    prompt_token_ids: Sequence[int],
    tool_config: ToolCallConfig | None,
) -> MessageFormat:
    """Return how the message of a chat is parsed.

    A grammar constrains the text from its first token, so such a text has no reasoning.
    """
    includes_reasoning = body.include_reasoning is not False
    if body.resolved_structured_output is not None or (tool_config and tool_config.is_enforced):
        return MessageFormat(tool_config=tool_config, includes_reasoning=includes_reasoning)
    template = tokenizer.tool_chat_template
    reasoning_format = detect_reasoning_format(template)
    prompt_end = tokenizer.decode(
        prompt_token_ids[-N_PROMPT_TOKENS_SEARCHED:], include_special_tokens=True
    )
    return MessageFormat(
        reasoning_format=reasoning_format,
        is_open=reasoning_format is not None and reasoning_format.is_open_after(prompt_end),
        is_harmony=CHANNEL_MARKER in template,
        tool_config=tool_config,
        includes_reasoning=includes_reasoning,
    )
