"""The bodies of requests, as strict as OpenAI's: a bool is no number and "1" is none either.

Parameters that are known but not honoured yet are refused when they ask for something; what is
unknown is ignored, as clients send it.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from faasmoe_router.api.errors import ApiError
from faasmoe_router.api.fields import Content, Prompts, Stops, Text

INT64_MAX = 2**63 - 1
MAX_CHOICES = 128

# What each parameter may be for it to change nothing.
_CHANGES_NOTHING: Mapping[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "allowed_token_ids": ([],),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "prediction": (),
    "presence_penalty": (0,),
    "prompt_logprobs": (False,),
    "reasoning_effort": (),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,),
    "stop_token_ids": ([],),
    "structured_outputs": ({},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "use_beam_search": (False,),
    "verbosity": (),
    "web_search_options": (),
}
_MESSAGE_CHANGES_NOTHING: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": (),
    "tool_calls": ([],),
}


class _Body(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, frozen=True)


class StreamOptions(_Body):
    """How a stream is told."""

    include_usage: bool | None = None


class SamplingBody(_Body):
    """What both kinds of completion take."""

    model: Text
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    seed: Annotated[int, Field(ge=-INT64_MAX - 1, le=INT64_MAX)] | None = None
    stop: Stops = ()
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def token_limit(self) -> tuple[str, int] | None:
        """The most tokens to generate, after the parameter that says so, if one does."""
        return None if self.max_tokens is None else ("max_tokens", self.max_tokens)

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def check(self) -> None:
        """Refuse what is asked for but not honoured; raises ApiError that names it."""
        _refuse(self.model_extra, _CHANGES_NOTHING)
        if self.stream_options is not None and not self.stream:
            raise ApiError(
                "The 'stream_options' parameter is only allowed when 'stream' is true.",
                param="stream_options",
                code="invalid_value",
            )


class ChatMessage(_Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content
    name: Text | None = None
    tool_call_id: Text | None = None

    def for_template(self, path: str) -> dict[str, str]:
        """Return what a chat template takes; raises ApiError that names the field."""
        _refuse(self.model_extra, _MESSAGE_CHANGES_NOTHING, path=f"{path}.")
        if self.content is None:
            raise ApiError(
                f"Invalid value for '{path}.content': expected a string, got null.",
                param=f"{path}.content",
                code="invalid_value",
            )
        return {
            "role": self.role,
            "content": self.content,
            **({"name": self.name} if self.name is not None else {}),
            **({"tool_call_id": self.tool_call_id} if self.tool_call_id is not None else {}),
        }


class ChatBody(SamplingBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def token_limit(self) -> tuple[str, int] | None:
        """The most tokens to generate, after its parameter; the newer parameter wins."""
        if self.max_completion_tokens is None:
            return super().token_limit
        return "max_completion_tokens", self.max_completion_tokens


class CompletionBody(SamplingBody):
    """POST /v1/completions."""

    prompt: Prompts


def _is_one_of(value: Any, neutral: tuple[Any, ...]) -> bool:
    # 0 == False, but a completion's "logprobs": 0 does ask for something.
    return any(value == n and isinstance(value, bool) == isinstance(n, bool) for n in neutral)


def _refuse(
    extra: Mapping[str, Any] | None, neutral: Mapping[str, tuple[Any, ...]], path: str = ""
) -> None:
    for name, value in (extra or {}).items():
        if name in neutral and value is not None and not _is_one_of(value, neutral[name]):
            raise ApiError(
                f"Unsupported parameter: '{path}{name}' is not supported by this server yet.",
                param=f"{path}{name}",
                code="unsupported_parameter",
            )
