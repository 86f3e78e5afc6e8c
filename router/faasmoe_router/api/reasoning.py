"""Reasoning of one chat request: whether and how the model writes it, told by its chat template."""

from collections.abc import Sequence
from dataclasses import dataclass

from faasmoe_router.api.protocol import ChatCompletionRequest
from faasmoe_router.api.tool_calling import ToolCallConfig
from faasmoe_router.engine.generation import ReasoningTokens
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


@dataclass(frozen=True, slots=True)
class Reasoning:
    """The reasoning that the text of one chat may start with.

    Attributes:
        reasoning_format: how reasoning is marked; None if the model has none.
        is_open: whether the prompt opens reasoning that the text continues.
        is_closed: whether the prompt has closed it, so that the text has none.
        tokens: its marks as tokens; None if the model has none or they are not one token each.
    """

    reasoning_format: ReasoningFormat | None = None
    is_open: bool = False
    is_closed: bool = False
    tokens: ReasoningTokens | None = None

    @property
    def before_grammar(self) -> ReasoningTokens | None:
        """The reasoning that may precede a constrained text; None if it is constrained at once."""
        return None if self.is_closed else self.tokens


def resolve_reasoning(tokenizer: ModelTokenizer, prompt_token_ids: Sequence[int]) -> Reasoning:
    """Return the reasoning of the text that follows a prompt, as the chat template marks it."""
    reasoning_format = detect_reasoning_format(tokenizer.tool_chat_template)
    if reasoning_format is None:
        return Reasoning()
    prompt_end = tokenizer.decode(
        prompt_token_ids[-N_PROMPT_TOKENS_SEARCHED:], include_special_tokens=True
    )
    is_open = reasoning_format.is_open_after(prompt_end)
    start = tokenizer.token_id(reasoning_format.start_marker)
    end = tokenizer.token_id(reasoning_format.end_marker)
    tokens = None if start is None or end is None else ReasoningTokens(start, end, is_open)
    return Reasoning(
        reasoning_format,
        is_open=is_open,
        is_closed=reasoning_format.is_closed_after(prompt_end),
        tokens=tokens,
    )


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
    reasoning: Reasoning,
    tool_config: ToolCallConfig | None,
) -> MessageFormat:
    """Return how the message of a chat is parsed.

    Where marks are not tokens, and in harmony, a grammar constrains the text from its first token;
    such a text has no reasoning.
    """
    includes_reasoning = body.include_reasoning is not False
    is_enforced = tool_config is not None and tool_config.is_enforced
    is_constrained = body.resolved_structured_output is not None or is_enforced
    if is_constrained and reasoning.before_grammar is None:
        return MessageFormat(tool_config=tool_config, includes_reasoning=includes_reasoning)
    return MessageFormat(
        reasoning_format=reasoning.reasoning_format,
        is_open=reasoning.is_open,
        is_harmony=CHANNEL_MARKER in tokenizer.tool_chat_template,
        tool_config=tool_config,
        includes_reasoning=includes_reasoning,
    )
