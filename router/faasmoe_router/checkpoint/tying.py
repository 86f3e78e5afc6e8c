"""Parameters with two names: each is stored once, under one of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from faasmoe_router.checkpoint.conversion import Conversion, Job, run_job

_log = logging.getLogger(__name__)


def aliases(model: PreTrainedModel, conversion: Conversion) -> dict[str, str]:
    """Return the names that are not stored, each with the name that stands for it.

    Names are tied by the model's class (`all_tied_weights_keys`) or because modules are shared. As
    in transformers, names that the class ties but the checkpoint gives different values stay apart.
    """
    makers = {name: job for job in conversion.jobs for name in job.targets}
    tied: dict[str, str] = {}
    for target, source in model.all_tied_weights_keys.items():
        if target in makers and source in makers and not _equal(target, source, makers, model):
            _log.warning("%s and %s are tied by the class but differ: both kept", target, source)
        else:
            tied[target] = source
    return _shared(model) | tied


def _shared(model: PreTrainedModel) -> dict[str, str]:
    first: dict[int, str] = {}
    found: dict[str, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        stands = first.setdefault(id(tensor), name)
        if stands != name:
            found[name] = stands
    return found


def _equal(one: str, other: str, makers: Mapping[str, Job], model: PreTrainedModel) -> bool:
    """Compare two parameters piece by piece."""
    if makers[one].targets[one] != makers[other].targets[other]:
        return False
    pieces = zip(run_job(makers[one], model), run_job(makers[other], model), strict=True)
    return all(torch.equal(a.tensor, b.tensor) for a, b in pieces)
