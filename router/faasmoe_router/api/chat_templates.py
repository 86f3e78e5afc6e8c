"""What a chat template receives: messages, tools and variables."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from faasmoe_router.api.errors import invalid_value, unsupported_param
from faasmoe_router.api.protocol import ChatCompletionRequest
from faasmoe_router.api.structured_outputs import dump_json
from faasmoe_router.api.tool_calling import ToolCallConfig
from faasmoe_router.engine.tokenizer import RESERVED_TEMPLATE_KWARGS, ChatTemplateOptions
from faasmoe_router.toolcalls.reasoning import detect_reasoning_format


def template_variables(chat_template_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a request's chat template variables; raises ApiError if one has a reserved name."""
    reserved = RESERVED_TEMPLATE_KWARGS.intersection(chat_template_kwargs or ())
    if reserved:
        raise invalid_value(
            f"chat_template_kwargs.{min(reserved)}", "this template variable is reserved"
        )
    return dict(chat_template_kwargs or {})


def chat_template_options(
    body: ChatCompletionRequest, tool_config: ToolCallConfig | None, *, chat_template: str
) -> ChatTemplateOptions:
    """Return what the template of a chat receives beside its messages; raises ApiError."""
    variables = {
        **_effort_variables(body.reasoning_effort, chat_template),
        **template_variables(body.chat_template_kwargs),
    }
    return ChatTemplateOptions(
        tools=() if tool_config is None or tool_config.is_prompted else tool_config.template_tools,
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
        add_special_tokens=bool(body.add_special_tokens),
        template_kwargs=variables,
    )


def _effort_variables(effort: str | None, chat_template: str) -> dict[str, Any]:
    """Return the template variables of a reasoning effort.

    Templates without efforts may turn reasoning off, and models without reasoning need not.

    Raises:
        ApiError: reasoning is to be off, and the template cannot turn it off.
    """
    if effort is None:
        return {}
    if "reasoning_effort" in chat_template:
        return {"reasoning_effort": effort}
    if effort == "none" and "enable_thinking" in chat_template:
        return {"enable_thinking": False}
    if effort == "none" and detect_reasoning_format(chat_template) is not None:
        reason = "cannot be 'none': this model's chat template cannot turn reasoning off"
        raise unsupported_param("reasoning_effort", reason)
    return {}


def template_notes(body: ChatCompletionRequest, chat_template: str) -> Iterator[str]:
    """Yield what of a chat's parameters has no effect on its template, for the client."""
    if body.reasoning_effort not in (None, "none") and "reasoning_effort" not in chat_template:
        yield "reasoning_effort has no effect: the model's chat template knows no efforts"


def message_texts(messages: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    """Yield the texts of messages that are to be rendered, without their roles."""
    for message in messages:
        for name, value in message.items():
            if name == "tool_calls":
                for call in value:
                    yield call["function"]["name"]
                    yield str(call["function"]["arguments"])
            elif name != "role":
                yield value if isinstance(value, str) else dump_json(value)
