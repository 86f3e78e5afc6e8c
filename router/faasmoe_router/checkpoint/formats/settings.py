"""What a checkpoint's config says about how it was quantised."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faasmoe_router.errors import SourceUnsupported

CONFIG_FIELDS = ("quantization_config", "compression_config")
MODELOPT_FILE = "hf_quant_config.json"
QUANTIZATION_FILES = (MODELOPT_FILE, "quantize_config.json", "quant_config.json")
"""Files beside config.json that describe codes which a store does not have."""


@dataclass(frozen=True, slots=True)
class QuantizationSettings:
    """The settings of a checkpoint's quantisation.

    Attributes:
        method: its method, such as fp8.
        path: the file and field that say so, for messages.
        fields: the fields of the method.
    """

    method: str
    path: str
    fields: Mapping[str, Any] = field(default_factory=dict)

    def error(self, name: str, expected: object) -> SourceUnsupported:
        """Return an error that names a field, its value and what was expected."""
        got = json.dumps(self.fields.get(name))
        return SourceUnsupported(f"{self.path}.{name}: got {got}, expected {expected}")

    def choice(self, name: str, choices: tuple[str, ...], *, default: str) -> str:
        """Return a text in lowercase that is one of `choices`; raises SourceUnsupported."""
        value = self.fields.get(name, default)
        if not isinstance(value, str) or value.lower() not in choices:
            raise self.error(name, f"one of {', '.join(choices)}")
        return value.lower()

    def integer(self, name: str, *, default: int | None = None) -> int:
        """Return an integer; raises SourceUnsupported."""
        value = self.fields.get(name, default)
        if type(value) is not int:
            raise self.error(name, "an integer")
        return value

    def flag(self, name: str, *, default: bool) -> bool:
        """Return a boolean; raises SourceUnsupported."""
        value = self.fields.get(name, default)
        if type(value) is not bool:
            raise self.error(name, "true or false")
        return value


def read_settings(folder: Path, config: Mapping[str, Any]) -> QuantizationSettings | None:
    """Return the settings of a checkpoint's quantisation; None if it is not quantised.

    Args:
        folder: the checkpoint's folder.
        config: the content of its config.json.

    Raises:
        SourceUnsupported: they are not an object that names a method.
    """
    text_config = config.get("text_config")
    sections = {"": config, "text_config.": text_config if isinstance(text_config, dict) else {}}
    for prefix, section in sections.items():
        for name in CONFIG_FIELDS:
            if section.get(name):
                path = f"{folder / 'config.json'}: {prefix}{name}"
                return _settings(path, section[name], section)
    if (folder / MODELOPT_FILE).is_file():
        return _modelopt_file_settings(folder / MODELOPT_FILE)
    return None


def without_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without the fields that describe codes, which a store does not have."""
    kept = {name: value for name, value in config.items() if name not in CONFIG_FIELDS}
    if isinstance(kept.get("text_config"), Mapping):
        kept["text_config"] = without_settings(kept["text_config"])
    return kept


def _settings(path: str, value: object, section: Mapping[str, Any]) -> QuantizationSettings:
    fields = value if isinstance(value, Mapping) else {"quant_method": value}
    method = fields.get("quant_method")
    if method is None and "config_groups" in fields:
        method = "compressed-tensors"
    if not isinstance(method, str):
        raise SourceUnsupported(f"{path}: got quant_method {method!r}, expected a name")
    if "expert_dtype" in section and "expert_dtype" not in fields:  # DeepSeek V4
        fields = {**fields, "expert_dtype": section["expert_dtype"]}
    return QuantizationSettings(method.lower(), path, fields)


def _modelopt_file_settings(path: Path) -> QuantizationSettings:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        fields = content["quantization"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise SourceUnsupported(
            f"{path}: got no object `quantization` in JSON: {error}, expected modelopt's settings"
        ) from error
    if not isinstance(fields, dict):
        raise SourceUnsupported(f"{path}: quantization: got {fields!r}, expected an object")
    return QuantizationSettings("modelopt", f"{path}: quantization", fields)
