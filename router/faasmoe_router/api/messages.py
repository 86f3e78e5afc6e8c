"""The messages of a conversation, and what a chat template takes of them."""

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from faasmoe_router.api.errors import ApiError
from faasmoe_router.api.fields import Content, Text
from faasmoe_router.api.unsupported import MESSAGE_PARAMETERS, refuse


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, frozen=True)


class CalledFunction(_Part):
    """The function of a call that the assistant made."""

    name: Text
    arguments: Text


class ToolCall(_Part):
    """A call that the assistant made."""

    id: Text
    type: Literal["function"] = "function"
    function: CalledFunction

    def for_template(self, path: str) -> dict[str, Any]:
        """Return what a chat template takes: the arguments as an object."""
        try:
            arguments = json.loads(self.function.arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise _wrong(f"{path}.function.arguments", "expected a JSON object, written as text")
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": "function", "function": function}


class ChatMessage(_Part):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    name: Text | None = None
    tool_call_id: Text | None = None
    tool_calls: list[ToolCall] | None = None

    def for_template(self, path: str) -> dict[str, Any]:
        """Return what a chat template takes; raises ApiError that names the field."""
        refuse(self.model_extra, MESSAGE_PARAMETERS, path=f"{path}.")
        if self.tool_calls and self.role != "assistant":
            raise _wrong(f"{path}.tool_calls", "expected them from the assistant only")
        if self.content is None and not self.tool_calls:
            raise self._no_content(f"{path}.content")
        calls = [
            call.for_template(f"{path}.tool_calls[{index}]")
            for index, call in enumerate(self.tool_calls or ())
        ]
        return {
            "role": self.role,
            "content": self.content or "",
            **({"name": self.name} if self.name is not None else {}),
            **({"tool_call_id": self.tool_call_id} if self.tool_call_id is not None else {}),
            **({"tool_calls": calls} if calls else {}),
        }

    def _no_content(self, path: str) -> ApiError:
        if "content" in self.model_fields_set:
            return _wrong(path, "expected a string, got null")
        return ApiError(
            f"Missing required parameter: '{path}'.",
            param=path,
            code="missing_required_parameter",
        )


def _wrong(param: str, expected: str) -> ApiError:
    return ApiError(f"Invalid value for '{param}': {expected}.", param=param, code="invalid_value")
