"""How a chat's tools are called: by which form, in which grammar, and which calls are wanted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from faasmoe_router.api.constraints import Constraint
from faasmoe_router.api.errors import ApiError
from faasmoe_router.api.requests import ChatBody
from faasmoe_router.api.unsupported import unsupported
from faasmoe_router.engine.grammar import JSON_OPTIONS, GrammarSource
from faasmoe_router.engine.text import TextCodec
from faasmoe_router.toolcalls.forms import HERMES, CallForm, form_of, takes_tools
from faasmoe_router.toolcalls.grammar import Tool, calls_grammar
from faasmoe_router.toolcalls.parser import CallParser


@dataclass(frozen=True, slots=True)
class Calling:
    """How one chat's tools are called.

    Attributes:
        form: how the model writes calls.
        shown: the tools, as the chat template takes them.
        names: the tools' names.
        mode: whether calls are up to the model, wanted, or wanted of one tool.
        many: whether several calls may be made.
        grammar: what holds the text to calls, if it is to be held.
    """

    form: CallForm
    shown: tuple[Mapping[str, Any], ...]
    names: frozenset[str]
    mode: Literal["auto", "required", "named"]
    many: bool
    grammar: GrammarSource | None

    def parser(self) -> CallParser:
        """Return what reads the calls of one text."""
        return CallParser(self.form, self.names, many=self.many)


def calling_of(body: ChatBody, codec: TextCodec) -> Calling | None:
    """Return how a chat's tools are called; None if they are not to be.

    Raises:
        ApiError: they cannot be with this model, or not together with something else.
    """
    choice = body.choice_of_tools
    if not body.tools or choice.mode == "none":
        return None
    if not takes_tools(codec.template):
        raise unsupported("tools", "is not supported by this model's chat template")
    form = form_of(codec.template)
    if form is None and choice.mode == "auto":
        raise unsupported(
            "tools",
            "is supported with this model's chat template for 'tool_choice' required or a function "
            "only",
        )
    many = choice.mode != "named" and body.parallel_tool_calls is not False
    form = form or HERMES
    return Calling(
        form=form,
        shown=tuple(tool.for_template() for tool in body.tools),
        names=frozenset(tool.function.name for tool in body.tools),
        mode=choice.mode,
        many=many,
        grammar=_grammar(body, codec, form, many=many),
    )


def _grammar(
    body: ChatBody, codec: TextCodec, form: CallForm, *, many: bool
) -> GrammarSource | None:
    instead = None
    if body.choice_of_tools.mode == "auto":
        instead = _json_schema(body.response_format)
        if instead is None:
            return None
    elif body.constraint is not None and body.response_format is None:
        raise ApiError(
            f"Invalid value for '{body.constraint.param}': expected none beside 'tool_choice'.",
            param=body.constraint.param,
            code="invalid_value",
        )

    def mark(text: str) -> str:
        return _mark(text, codec)

    text = calls_grammar(
        _wanted(body), form, mark=mark, json_options=JSON_OPTIONS, many=many, instead=instead
    )
    return GrammarSource("lark", text)


def _wanted(body: ChatBody) -> Sequence[Tool]:
    choice = body.choice_of_tools
    functions = [tool.function for tool in body.tools or ()]
    return [
        Tool(function.name, function.parameters)
        for function in functions
        if choice.mode != "named" or function.name == choice.name
    ]


def _mark(text: str, codec: TextCodec) -> str:
    token = codec.special_id(text)
    return f'"{text}"' if token is None else f"<[{token}]>"


def _json_schema(constraint: Constraint | None) -> str | None:
    return None if constraint is None else constraint.source.text
