"""Field types of requests that may be written in several ways, brought to one.

Written by hand rather than as unions, so that an error names the field and not a branch of a union.
"""

from typing import Annotated, Any

from pydantic import AfterValidator, PlainValidator
from pydantic_core import PydanticCustomError

MAX_STOPS = 4
MAX_STOP_LENGTH = 1024
MAX_PROMPTS = 128


def _wrong(kind: str, expected: str) -> PydanticCustomError:
    # The text is passed as a value: it may quote the client, braces and all.
    return PydanticCustomError(f"expected_{kind}", "{expected}", {"expected": expected})


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def read_text(value: str) -> str:
    """Read a string; halves of surrogates, which JSON can write, are no text."""
    if not _is_text(value):
        raise _wrong("type", "Input should be a valid string")
    return value


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def read_stops(value: Any) -> tuple[str, ...]:
    """Read `stop`: null, one string, or up to four."""
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(_is_text(stop) for stop in stops):
        raise _wrong("type", "Input should be a string or a list of strings")
    if len(stops) > MAX_STOPS:
        raise _wrong("value", f"Input should have at most {MAX_STOPS} stop strings")
    if not all(1 <= len(stop) <= MAX_STOP_LENGTH for stop in stops):
        raise _wrong("value", f"Stop strings should have 1 to {MAX_STOP_LENGTH} characters")
    return tuple(stops)


def read_content(value: Any) -> str | None:
    """Read a message's `content`: null, a string, or a list of text parts."""
    if value is None:
        return None
    if isinstance(value, list):
        return "".join(_read_part(part, index) for index, part in enumerate(value))
    if not _is_text(value):
        raise _wrong("type", "Input should be a valid string or a list of text parts")
    return str(value)


def _read_part(part: Any, index: int) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        raise _wrong("value", f'Part [{index}] should be an object of type "text"')
    if not _is_text(part.get("text")):
        raise _wrong("type", f"Part [{index}].text should be a valid string")
    return str(part["text"])


Prompt = str | tuple[int, ...]


def read_prompts(value: Any) -> tuple[Prompt, ...]:
    """Read `prompt`: a string, a list of strings, a list of tokens, or a list of those."""
    if isinstance(value, str) or (isinstance(value, list) and value and _is_token(value[0])):
        value = [value]
    if not isinstance(value, list) or not value:
        raise _wrong("type", "Input should be a string, strings, tokens, or lists of tokens")
    if len(value) > MAX_PROMPTS:
        raise _wrong("value", f"Input should have at most {MAX_PROMPTS} prompts")
    return tuple(_read_prompt(prompt, index) for index, prompt in enumerate(value))


def _read_prompt(prompt: Any, index: int) -> Prompt:
    if isinstance(prompt, list) and prompt and all(map(_is_token, prompt)):
        return tuple(prompt)
    if not _is_text(prompt):
        raise _wrong("type", f"Prompt [{index}] should be a valid string or a list of tokens")
    return str(prompt)


Text = Annotated[str, AfterValidator(read_text)]
Stops = Annotated[
    tuple[str, ...], PlainValidator(read_stops, json_schema_input_type=str | list[str] | None)
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
