"""What `up`, `plan` and `prepare` serve: MODEL, or -f FILE, and options that set fields of either.

MODEL alone becomes a MoEModel with defaults. The options are fields of a MoEModel: with -f they
override the file's, and errors name the option that set a field.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from faasmoe_contracts.store import Manifest, QuantizationEntry
from faasmoe_contracts.store.quantization import EXPERTS_QUANTIZATIONS, ROUTER_QUANTIZATIONS
from faasmoe_operator.api.v1alpha1 import MoEModel, MoEModelError
from faasmoe_operator.api.v1alpha1.moemodel import API_VERSION, KIND
from faasmoe_operator.api.v1alpha1.validation import format_validation_errors
from faasmoe_operator.cli.model_source import ModelSource
from faasmoe_operator.cli.store_cache import CachedStore
from faasmoe_operator.control.local_model import LocalModel, name_options
from faasmoe_operator.errors import CommandError

DTYPES = ("auto", "bfloat16", "float16", "float32")
MODEL_HELP = (
    "a checkpoint: ORG/NAME on the Hugging Face hub (of GGUF files ORG/NAME:QUANT or "
    "ORG/NAME:FILE), a folder, or a GGUF file"
)


@dataclass(frozen=True, slots=True)
class FieldOption:
    """An option that sets a field of the MoEModel.

    Attributes:
        flag: as on the command line.
        field: path of the field.
        attribute: its name among the parsed arguments.
    """

    flag: str
    field: str
    attribute: str


FIELD_OPTIONS = (
    FieldOption("--revision", "spec.model.revision", "revision"),
    FieldOption("--dtype", "spec.model.dtype", "dtype"),
    FieldOption("--quantization", "spec.experts.quantization", "quantization"),
    FieldOption("--quantize-router", "spec.router.quantization", "quantize_router"),
    FieldOption(
        "--experts-per-function", "spec.granularity.expertsPerFunction", "experts_per_function"
    ),
    FieldOption("--max-model-len", "spec.router.maxModelLen", "max_model_len"),
    FieldOption("--served-model-name", "spec.router.servedModelName", "served_model_name"),
)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add MODEL and -f, of which `load_model` expects one."""
    group = parser.add_argument_group("model", "One of MODEL and -f.")
    group.add_argument("model", metavar="MODEL", nargs="?", help=MODEL_HELP)
    group.add_argument(
        "-f", "--file", type=Path, help="a MoEModel file, for every setting there is"
    )


def add_models(parser: argparse.ArgumentParser) -> None:
    """Add MODEL and any number of -f."""
    group = parser.add_argument_group("model", "One of MODEL and -f.")
    group.add_argument("model", metavar="MODEL", nargs="?", help=MODEL_HELP)
    group.add_argument(
        "-f",
        "--file",
        dest="files",
        action="append",
        default=[],
        type=Path,
        help="a file of MoEModels and Tenants, or a folder of such files; repeat it for several",
    )


def given_options(arguments: argparse.Namespace) -> list[str]:
    """Return the options that set a field of one model."""
    return [option.flag for option in _settings(arguments)]


def add_store_options(group: argparse._ArgumentGroup, *quantization_aliases: str) -> None:
    """Add the options on which the content of a store depends."""
    group.add_argument("--revision", metavar="REV", help="branch, tag or commit on the hub")
    group.add_argument(
        "--dtype", choices=DTYPES, help="dtype of the weights; auto is the checkpoint's (default)"
    )
    group.add_argument(
        "--quantization",
        *quantization_aliases,
        choices=EXPERTS_QUANTIZATIONS,
        help="store the experts so: int8 is close to lossless in half the bytes, int4 and mxfp4 "
        "are lossy in a quarter; none keeps the codes of a quantised checkpoint where kernels "
        "read them (default: none)",
    )
    group.add_argument(
        "--quantize-router",
        choices=ROUTER_QUANTIZATIONS,
        help="store the router's linear layers so, gates excepted; with int4 the LM head is int8 "
        "(default: none)",
    )


def add_granularity(group: argparse._ArgumentGroup) -> None:
    """Add the option for the size of functions."""
    group.add_argument(
        "--experts-per-function",
        type=_experts_per_function,
        metavar="N",
        help="experts of a layer in one function; auto makes about 3 functions per layer (default)",
    )


def _experts_per_function(text: str) -> int | str:
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number or auto")
    return text if text == "auto" else int(text)


def requested_quantization(arguments: argparse.Namespace) -> QuantizationEntry:
    """Return what the options ask to quantise."""
    return QuantizationEntry(arguments.quantization or "none", arguments.quantize_router or "none")


def requested_dtype(arguments: argparse.Namespace) -> str | None:
    """Return the dtype that --dtype asks for; None for the checkpoint's."""
    return None if arguments.dtype == "auto" else arguments.dtype


def cached_store(source: ModelSource, arguments: argparse.Namespace) -> CachedStore:
    """Return where the store of a MODEL with these options is kept."""
    return CachedStore.of(
        source,
        revision=arguments.revision,
        dtype=requested_dtype(arguments),
        quantization=requested_quantization(arguments),
    )


@dataclass(frozen=True, slots=True)
class RequestedModel:
    """The model that a command line asks for.

    Attributes:
        deployment: it and its files on this machine.
        cached: its store in the user's cache; None with -f.
    """

    deployment: LocalModel
    cached: CachedStore | None

    @property
    def is_prepared(self) -> bool:
        """Whether there is a store; that of a MODEL must be of the checkpoint as it is now."""
        return self.deployment.is_prepared if self.cached is None else self.cached.is_current

    def laid_out(self, manifest: Manifest) -> LocalModel:
        """Return the model as served: a MODEL in as many sandboxes as a layer has functions.

        The default of a MoEModel, a sandbox for each function, suits pods; on one machine the
        functions of a layer, which are called at once, are what can run in parallel.

        Raises:
            MoEModelError: the model cannot be partitioned as requested.
        """
        if self.cached is None:
            return self.deployment
        functions = self.deployment.functions(manifest, key=bytes(16))
        in_layer = Counter(layer for function in functions for layer in function.layers)
        capacity = -(-len(functions) // max(in_layer.values()))
        spec = self.deployment.model.spec
        experts = spec.experts.model_copy(update={"functions_per_sandbox": capacity})
        model = self.deployment.model.model_copy(
            update={"spec": spec.model_copy(update={"experts": experts})}
        )
        return replace(self.deployment, model=model)


def load_model(arguments: argparse.Namespace) -> RequestedModel:
    """Return the model of MODEL or -f with the options of the command line.

    Raises:
        CommandError: both or neither are given, or MODEL is nothing that can be served.
        MoEModelError: the file or an option is invalid.
    """
    text, file = arguments.model, _file(arguments)
    if (text is None) == (file is None):
        got = "neither" if text is None else f"MODEL {text!r} and -f {file}"
        raise CommandError(
            f"expected MODEL or -f FILE, got {got}; --help shows examples", exit_status=2
        )
    settings = _settings(arguments)
    if file is not None:
        deployment = LocalModel.load(file)
        return RequestedModel(
            _with_settings(deployment, settings) if settings else deployment, None
        )
    source = ModelSource.parse(text)
    if source.path is not None and arguments.revision is not None:
        raise CommandError(
            f"--revision: got {arguments.revision!r}, expected none for {source.path}: only a "
            "model on the hub has revisions",
            exit_status=2,
        )
    cached = cached_store(source, arguments)
    return RequestedModel(_generated_model(source, cached, settings), cached)


def _file(arguments: argparse.Namespace) -> Path | None:
    """Return the file of `add_model`, or the only one of `add_models`."""
    files = arguments.files if "files" in arguments else [arguments.file]
    return next(iter(files), None)


def _settings(arguments: argparse.Namespace) -> dict[FieldOption, Any]:
    """Return the values of the options that the command has and that are given."""
    values = ((option, getattr(arguments, option.attribute, None)) for option in FIELD_OPTIONS)
    return {option: value for option, value in values if value is not None}


def _generated_model(
    source: ModelSource, cached: CachedStore, settings: Mapping[FieldOption, Any]
) -> LocalModel:
    document = {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {"name": source.name},
        "spec": {
            "model": {"source": source.uri},
            "store": {"path": str(cached.path)},
            "router": {"servedModelName": source.served_name},
        },
    }
    options = {"spec.store.path": "store"} | _options(settings)
    model = _validated(document, settings, label=source.text, options=options)
    return LocalModel(cached.path, model, label=source.text, options=options, is_modified=True)


def _with_settings(deployment: LocalModel, settings: Mapping[FieldOption, Any]) -> LocalModel:
    document = deployment.model.model_dump(mode="json", by_alias=True, exclude_unset=True)
    label, options = str(deployment.file), _options(settings)
    model = _validated(document, settings, label=label, options=options)
    return LocalModel(deployment.file, model, options=options, is_modified=True)


def _options(settings: Mapping[FieldOption, Any]) -> dict[str, str]:
    return {option.field: option.flag for option in settings}


def _validated(
    document: dict[str, Any],
    settings: Mapping[FieldOption, Any],
    *,
    label: str,
    options: Mapping[str, str],
) -> MoEModel:
    for option, value in settings.items():
        *parents, name = option.field.split(".")
        section = document
        for parent in parents:
            section = section.setdefault(parent, {})
        section[name] = value
    try:
        return MoEModel.model_validate(document)
    except ValidationError as error:
        problems = format_validation_errors(error, MoEModel)
        raise MoEModelError(label, name_options(problems, options=options)) from error
