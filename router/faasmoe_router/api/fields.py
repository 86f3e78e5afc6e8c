"""Field types of requests that may be written in several ways, brought to one.

Written by hand rather than as unions, so that an error names the field and not a branch of a union.
"""

from typing import Annotated, Any

from pydantic import AfterValidator, PlainValidator
from pydantic_core import PydanticCustomError

MAX_STOPS = 4
MAX_STOP_LENGTH = 1024
MAX_PROMPTS = 128
MAX_TOKEN_IDS = 1024
MAX_BIAS = 100
MAX_BAD_WORDS = 64


def wrong(kind: str, expected: str) -> PydanticCustomError:
    """Return a field's fault: of its type or of its value."""
    # The text is passed as a value: it may quote the client, braces and all.
    return PydanticCustomError(f"expected_{kind}", "{expected}", {"expected": expected})


def is_text(value: Any) -> bool:
    """Return whether a value is a string; halves of surrogates, which JSON can write, are none."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def read_text(value: str) -> str:
    """Read a string; halves of surrogates, which JSON can write, are no text."""
    if not is_text(value):
        raise wrong("type", "Input should be a valid string")
    return value


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def read_stops(value: Any) -> tuple[str, ...]:
    """Read `stop`: null, one string, or up to four."""
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(is_text(stop) for stop in stops):
        raise wrong("type", "Input should be a string or a list of strings")
    if len(stops) > MAX_STOPS:
        raise wrong("value", f"Input should have at most {MAX_STOPS} stop strings")
    if not all(1 <= len(stop) <= MAX_STOP_LENGTH for stop in stops):
        raise wrong("value", f"Stop strings should have 1 to {MAX_STOP_LENGTH} characters")
    return tuple(stops)


def read_tokens(value: Any) -> tuple[int, ...]:
    """Read a list of tokens."""
    if not isinstance(value, list) or not all(map(_is_token, value)):
        raise wrong("type", "Input should be a list of tokens")
    return tuple(value)


def read_few_tokens(value: Any) -> tuple[int, ...] | None:
    """Read a list of at most 1024 tokens, or null."""
    if value is None:
        return None
    tokens = read_tokens(value)
    if len(tokens) > MAX_TOKEN_IDS:
        raise wrong("value", f"Input should have at most {MAX_TOKEN_IDS} tokens")
    return tokens


def read_bias(value: Any) -> tuple[tuple[int, float], ...]:
    """Read `logit_bias`: null, or an object of tokens, written as strings, and numbers."""
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise wrong("type", "Input should be an object of tokens and numbers")
    if len(value) > MAX_TOKEN_IDS:
        raise wrong("value", f"Input should have at most {MAX_TOKEN_IDS} tokens")
    return tuple((_read_key(key), _read_bias(key, bias)) for key, bias in value.items())


def _read_key(key: str) -> int:
    if not (key.isascii() and key.isdecimal() and len(key) < 10):
        raise wrong("value", "Keys should be tokens, such as 50256")
    return int(key)


def _read_bias(key: str, bias: Any) -> float:
    if isinstance(bias, bool) or not isinstance(bias, int | float):
        raise wrong("type", f"The bias of {key} should be a number")
    if not -MAX_BIAS <= bias <= MAX_BIAS:
        raise wrong("value", f"The bias of {key} should be from -{MAX_BIAS} to {MAX_BIAS}")
    return float(bias)


def read_bad_words(value: Any) -> tuple[str, ...]:
    """Read `bad_words`: null, or strings that are not empty."""
    if value is None:
        return ()
    if not isinstance(value, list) or not all(is_text(word) for word in value):
        raise wrong("type", "Input should be a list of strings")
    if len(value) > MAX_BAD_WORDS:
        raise wrong("value", f"Input should have at most {MAX_BAD_WORDS} strings")
    if not all(1 <= len(word) <= MAX_STOP_LENGTH for word in value):
        raise wrong("value", f"Bad words should have 1 to {MAX_STOP_LENGTH} characters")
    return tuple(value)


def read_content(value: Any) -> str | None:
    """Read a message's `content`: null, a string, or a list of text parts."""
    if value is None:
        return None
    if isinstance(value, list):
        return "".join(_read_part(part, index) for index, part in enumerate(value))
    if not is_text(value):
        raise wrong("type", "Input should be a valid string or a list of text parts")
    return str(value)


def _read_part(part: Any, index: int) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        raise wrong("value", f'Part [{index}] should be an object of type "text"')
    if not is_text(part.get("text")):
        raise wrong("type", f"Part [{index}].text should be a valid string")
    return str(part["text"])


Prompt = str | tuple[int, ...]


def read_prompts(value: Any) -> tuple[Prompt, ...]:
    """Read `prompt`: a string, a list of strings, a list of tokens, or a list of those."""
    if isinstance(value, str) or (isinstance(value, list) and value and _is_token(value[0])):
        value = [value]
    if not isinstance(value, list) or not value:
        raise wrong("type", "Input should be a string, strings, tokens, or lists of tokens")
    if len(value) > MAX_PROMPTS:
        raise wrong("value", f"Input should have at most {MAX_PROMPTS} prompts")
    return tuple(_read_prompt(prompt, index) for index, prompt in enumerate(value))


def _read_prompt(prompt: Any, index: int) -> Prompt:
    if isinstance(prompt, list) and prompt and all(map(_is_token, prompt)):
        return tuple(prompt)
    if not is_text(prompt):
        raise wrong("type", f"Prompt [{index}] should be a valid string or a list of tokens")
    return str(prompt)


Text = Annotated[str, AfterValidator(read_text)]
Stops = Annotated[
    tuple[str, ...], PlainValidator(read_stops, json_schema_input_type=str | list[str] | None)
]
Tokens = Annotated[tuple[int, ...], PlainValidator(read_tokens, json_schema_input_type=list[int])]
FewTokens = Annotated[
    tuple[int, ...] | None,
    PlainValidator(read_few_tokens, json_schema_input_type=list[int] | None),
]
LogitBias = Annotated[
    tuple[tuple[int, float], ...],
    PlainValidator(read_bias, json_schema_input_type=dict[str, float] | None),
]
BadWords = Annotated[
    tuple[str, ...],
    PlainValidator(read_bad_words, json_schema_input_type=list[str] | None),
]
Content = Annotated[
    str | None,
    PlainValidator(read_content, json_schema_input_type=str | list[dict[str, str]] | None),
]
Prompts = Annotated[
    tuple[Prompt, ...],
    PlainValidator(
        read_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]
    ),
]
