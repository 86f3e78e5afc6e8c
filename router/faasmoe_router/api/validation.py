"""Request bodies: their base, validators of fields, and parameters that are known but unsupported.

Fields that OpenAI accepts in several forms are parsed by hand into one form: with pydantic unions,
an error would name a branch of the union instead of the field. A known but unsupported parameter is
rejected by name unless its value is neutral, that is, asks for the default behaviour. Unknown
parameters are ignored, as clients expect.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from faasmoe_router.api.errors import unsupported_param

MAX_STOP_STRINGS = 4
MAX_STOP_STRING_LENGTH = 1024
MAX_PROMPTS = 128
MAX_TOKEN_IDS = 1024
MAX_LOGIT_BIAS = 100
MAX_BAD_WORDS = 64
MAX_MESSAGES = 2048
MAX_CONTENT_PARTS = 2048
MAX_TOOL_CALLS = 128  # of one message


class RequestModel(BaseModel):
    """Base of all request models: strict types, finite numbers, unknown fields are dropped.

    Attributes:
        unsupported_parameters: undeclared fields that are known, each with its neutral values.
        known_extra: other undeclared fields that are known.
        keeps_unknown: whether unknown fields are kept, because something may know them.
    """

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, frozen=True)

    unsupported_parameters: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    known_extra: ClassVar[frozenset[str]] = frozenset()
    keeps_unknown: ClassVar[bool] = False

    @model_validator(mode="before")
    @classmethod
    def _drop_unknown(cls, value: Any) -> Any:
        if not isinstance(value, dict) or cls.keeps_unknown:
            return value
        known = cls.model_fields.keys() | cls.unsupported_parameters.keys() | cls.known_extra
        return {name: value[name] for name in value if name in known}


def field_error(fault: Literal["type", "value"], expected: str) -> PydanticCustomError:
    """Return the validation error of a field whose type or value is wrong."""
    # Passed as a context value: `expected` may quote client input, which may contain braces.
    return PydanticCustomError(f"expected_{fault}", "{expected}", {"expected": expected})


def is_valid_text(value: Any) -> bool:
    """Return whether a value is a string without lone surrogates, which JSON can escape."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()  # a loop over megabytes of characters would take a second
    except UnicodeEncodeError:
        return False
    return True


def parse_text(value: str) -> str:
    """Validate a string; one with lone surrogates is rejected, since it has no UTF-8 form."""
    if not is_valid_text(value):
        raise field_error("type", "Input should be a valid string")
    return value


def _is_token_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def parse_stop(value: Any) -> tuple[str, ...]:
    """Parse `stop`: null, a string, or a list of up to four strings."""
    if value is None:
        return ()
    stop_strings = [value] if isinstance(value, str) else value
    if isinstance(stop_strings, list) and len(stop_strings) > MAX_STOP_STRINGS:
        raise field_error("value", f"Input should have at most {MAX_STOP_STRINGS} stop strings")
    if not isinstance(stop_strings, list) or not all(is_valid_text(stop) for stop in stop_strings):
        raise field_error("type", "Input should be a string or a list of strings")
    if not all(1 <= len(stop) <= MAX_STOP_STRING_LENGTH for stop in stop_strings):
        raise field_error(
            "value", f"Stop strings should have 1 to {MAX_STOP_STRING_LENGTH} characters"
        )
    return tuple(stop_strings)


def parse_token_ids(value: Any) -> tuple[int, ...]:
    """Parse a list of token IDs."""
    if not isinstance(value, list) or not all(map(_is_token_id, value)):
        raise field_error("type", "Input should be a list of token IDs")
    return tuple(value)


def parse_bounded_token_ids(value: Any) -> tuple[int, ...] | None:
    """Parse a list of at most 1024 token IDs, or null."""
    if value is None:
        return None
    if isinstance(value, list) and len(value) > MAX_TOKEN_IDS:
        raise field_error("value", f"Input should have at most {MAX_TOKEN_IDS} token IDs")
    return parse_token_ids(value)


def parse_logit_bias(value: Any) -> tuple[tuple[int, float], ...]:
    """Parse `logit_bias`: null, or an object that maps token IDs, as strings, to numbers."""
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise field_error("type", "Input should be an object that maps token IDs to numbers")
    if len(value) > MAX_TOKEN_IDS:
        raise field_error("value", f"Input should have at most {MAX_TOKEN_IDS} token IDs")
    return tuple((_parse_token_key(key), _parse_bias(key, bias)) for key, bias in value.items())


def _parse_token_key(key: str) -> int:
    if not (key.isascii() and key.isdecimal() and len(key) < 10):
        raise field_error("value", "Keys should be token IDs, such as 50256")
    return int(key)


def _parse_bias(key: str, bias: Any) -> float:
    if isinstance(bias, bool) or not isinstance(bias, int | float):
        raise field_error("type", f"The bias of token {key} should be a number")
    if not -MAX_LOGIT_BIAS <= bias <= MAX_LOGIT_BIAS:
        raise field_error(
            "value", f"The bias of token {key} should be from -{MAX_LOGIT_BIAS} to {MAX_LOGIT_BIAS}"
        )
    return float(bias)


def parse_bad_words(value: Any) -> tuple[str, ...]:
    """Parse `bad_words`: null, or a list of non-empty strings."""
    if value is None:
        return ()
    if isinstance(value, list) and len(value) > MAX_BAD_WORDS:
        raise field_error("value", f"Input should have at most {MAX_BAD_WORDS} strings")
    if not isinstance(value, list) or not all(is_valid_text(word) for word in value):
        raise field_error("type", "Input should be a list of strings")
    if not all(1 <= len(word) <= MAX_STOP_STRING_LENGTH for word in value):
        raise field_error(
            "value", f"Bad words should have 1 to {MAX_STOP_STRING_LENGTH} characters"
        )
    return tuple(value)


def parse_message_content(value: Any) -> str | None:
    """Parse a message's `content`: null, a string, or a list of parts, which are joined.

    Parts are texts, and refusals of earlier answers, which are texts as well.
    """
    if value is None:
        return None
    if isinstance(value, list):
        if len(value) > MAX_CONTENT_PARTS:
            raise field_error("value", f"Input should have at most {MAX_CONTENT_PARTS} parts")
        return "".join(_parse_content_part(part, index) for index, part in enumerate(value))
    if not is_valid_text(value):
        raise field_error("type", "Input should be a valid string or a list of text parts")
    return str(value)


def _parse_content_part(part: Any, index: int) -> str:
    part_type = part.get("type") if isinstance(part, dict) else None
    if part_type not in ("text", "refusal"):
        raise field_error(
            "value", f'Part [{index}] should be an object of type "text" or "refusal"'
        )
    if not is_valid_text(part.get(part_type)):
        raise field_error("type", f"Part [{index}].{part_type} should be a valid string")
    return str(part[part_type])


Prompt = str | tuple[int, ...]


def parse_prompts(value: Any) -> tuple[Prompt, ...]:
    """Parse `prompt`: a string, a list of strings, a list of token IDs, or a list of such lists."""
    if isinstance(value, str) or (isinstance(value, list) and value and _is_token_id(value[0])):
        value = [value]
    if not isinstance(value, list) or not value:
        raise field_error(
            "type",
            "Input should be a string, a list of strings, a list of token IDs, or a list of such "
            "lists",
        )
    if len(value) > MAX_PROMPTS:
        raise field_error("value", f"Input should have at most {MAX_PROMPTS} prompts")
    return tuple(_parse_prompt(prompt, index) for index, prompt in enumerate(value))


def _parse_prompt(prompt: Any, index: int) -> Prompt:
    if isinstance(prompt, list) and prompt and all(map(_is_token_id, prompt)):
        return tuple(prompt)
    if not is_valid_text(prompt):
        raise field_error(
            "type", f"Prompt [{index}] should be a valid string or a list of token IDs"
        )
    return str(prompt)


Text = Annotated[str, AfterValidator(parse_text)]
CacheSalt = Annotated[Text, Field(min_length=1, max_length=MAX_STOP_STRING_LENGTH)]
StopStrings = Annotated[
    tuple[str, ...], PlainValidator(parse_stop, json_schema_input_type=str | list[str] | None)
]
TokenIds = Annotated[
    tuple[int, ...], PlainValidator(parse_token_ids, json_schema_input_type=list[int])
]
BoundedTokenIds = Annotated[
    tuple[int, ...] | None,
    PlainValidator(parse_bounded_token_ids, json_schema_input_type=list[int] | None),
]
LogitBias = Annotated[
    tuple[tuple[int, float], ...],
    PlainValidator(parse_logit_bias, json_schema_input_type=dict[str, float] | None),
]
BadWords = Annotated[
    tuple[str, ...],
    PlainValidator(parse_bad_words, json_schema_input_type=list[str] | None),
]
MessageContent = Annotated[
    str | None,
    PlainValidator(parse_message_content, json_schema_input_type=str | list[dict[str, str]] | None),
]
Prompts = Annotated[
    tuple[Prompt, ...],
    PlainValidator(
        parse_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]
    ),
]


# Known parameters that this server does not support, each with its neutral values.
UNSUPPORTED_PARAMS: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "chat_template": (),
    "documents": ([],),
    "function_call": ("none", "auto"),
    "guided_whitespace_pattern": (),
    "functions": ([],),
    "kv_transfer_params": (),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "prompt_cache_options": ({}, {"mode": "implicit"}),
    "prompt_cache_retention": ("in_memory",),
    "prompt_embeds": (),
    "service_tier": ("auto", "default"),
    "spaces_between_special_tokens": (True,),
    "structural_tag": (),
    "suffix": ("",),
    "thinking_token_budget": (),
    "use_beam_search": (False,),
    "verbosity": (),
    "vllm_xargs": ({},),
    "web_search_options": (),
}
UNSUPPORTED_CHAT_PARAMS: Mapping[str, tuple[Any, ...]] = {
    **UNSUPPORTED_PARAMS,
    "best_of": (1,),
}
UNSUPPORTED_COMPLETION_PARAMS: Mapping[str, tuple[Any, ...]] = {
    **UNSUPPORTED_PARAMS,
    "parallel_tool_calls": (True, False),
    "reasoning_effort": (),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
UNSUPPORTED_MESSAGE_PARAMS: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": (),
}


def reject_unsupported(
    extra_params: Mapping[str, Any] | None,
    neutral_values: Mapping[str, tuple[Any, ...]],
    path: str = "",
) -> None:
    """Raise ApiError for the first unsupported parameter with a value that is not neutral.

    Args:
        extra_params: the fields of a body that its model does not declare.
        neutral_values: the unsupported parameters, each with the values that change nothing.
        path: prefix of the parameter's name in the error, such as `messages[0].`.
    """
    for name, value in (extra_params or {}).items():
        if (
            name in neutral_values
            and value is not None
            and not _is_neutral(value, neutral_values[name])
        ):
            raise unsupported_param(f"{path}{name}")


def _is_neutral(value: Any, neutral_values: tuple[Any, ...]) -> bool:
    # 0 == False in Python, but `0` and `false` mean different things in a request.
    return any(
        value == n and isinstance(value, bool) == isinstance(n, bool) for n in neutral_values
    )
