"""Whether a sandbox's own list of functions agrees with what is written down of it. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from faasmoe_expert.table import FunctionSpec
from faasmoe_operator.control.sandbox_client import AttachedFunction


def fault_of_list(
    held: Sequence[AttachedFunction], specs: Mapping[str, FunctionSpec], *, model_digest: str
) -> str | None:
    """Return what is wrong with the list by itself; None if nothing is.

    Args:
        held: what the sandbox says that it holds.
        specs: the functions of the model, by id; others may be left from an earlier plan.
        model_digest: digest of the store that they are of.
    """
    for name, count in Counter(function.spec.id for function in held).items():
        if count > 1:
            return f"lists function {name} {count} times"
    for function in held:
        spec = specs.get(function.spec.id)
        if spec is not None and (function.spec, function.model_digest) != (spec, model_digest):
            return f"holds other experts as function {spec.id} than were attached"
    return None


def fault_of_content(
    held: Sequence[AttachedFunction], *, expected: Collection[str], possible: Collection[str]
) -> str | None:
    """Return how a sandbox's functions differ from those that it should hold; None if they agree.

    Args:
        held: what the sandbox says that it holds.
        expected: functions that were attached all the time.
        possible: functions that it may hold, as they come and go.
    """
    names = {function.spec.id for function in held}
    if missing := sorted(set(expected) - names):
        return f"holds {missing[0]} no more ({len(missing)} functions are missing)"
    if foreign := sorted(names - set(possible)):
        return f"holds {foreign[0]}, which was never attached ({len(foreign)} such functions)"
    return None
