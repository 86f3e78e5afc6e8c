"""Runs all decoder layers of a batch as one call of the kernel library.

The layers are a program (layer_program.py), which calls back for the routed experts of each. Where
the last norm and the LM head are recognized too, it computes scores, and a whole generation step is
one call (generation_step.py); embeddings, scheduling and cache stay transformers'. Where they are
not, only the forward of the model's decoder is replaced. A model with a layer that is not
recognized, or that computes something else than its description, keeps its modules. What comparing
has shown is kept for routers of equal models (remembered_program.py).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from faasmoe_kernels import load
from faasmoe_kernels.router_ops import HighestScores
from faasmoe_transformers.batch_inputs import BatchInputs, is_supported
from faasmoe_transformers.experts_backend import bound_computers, substituted_computer
from faasmoe_transformers.generation_step import GenerationStep, ScoresSampler
from faasmoe_transformers.layer_program import DifferingLayer, LayerDescriber, UnrecognizedLayer
from faasmoe_transformers.native_attention import ATTENTION_IMPLEMENTATION
from faasmoe_transformers.native_program import ModelProgram
from faasmoe_transformers.observation import FixedExperts, observe_passes
from faasmoe_transformers.remembered_program import ProgramMemory
from faasmoe_transformers.rotary_tables import RotaryTable

logger = logging.getLogger(__name__)

ComputeMode = Literal["auto", "modules", "torch"]
"""What computes the router's part of a model on a CPU in float32: auto is one call of the kernel
library for all decoder layers where that computes what transformers' modules do; modules always
runs these, with the library's linear layers and attention; torch leaves the library unused."""


class BatchPlanner(ScoresSampler, Protocol):
    """Chooses tokens, and is told before whose."""

    def plan(self, requests_with_new_token: list[Any]) -> None:
        """Prepare for the scores of these requests, in their order."""


def use_native_step(model: Any, batch_processor: Any, sampler: BatchPlanner) -> bool:
    """Replace the decoder's forward if all of its layers can be run by the kernel library.

    Args:
        model: the model, with native attention selected or not.
        batch_processor: the continuous batching's processor, before its first batch.
        sampler: chooses the tokens of each batch.

    Returns:
        Whether it was replaced.
    """
    decoder = _decoder_of(model)
    if model.config._attn_implementation != ATTENTION_IMPLEMENTATION or decoder is None:
        return False
    started_s = time.monotonic()
    try:
        program = _build(model, decoder, batch_processor)
    except DifferingLayer as reason:
        logger.warning("Decoder layers are run by transformers' modules: %s", reason)
        return False
    except UnrecognizedLayer as reason:
        logger.info("Decoder layers are run by transformers' modules: %s", reason)
        return False
    except Exception:  # the model's own, which the first batch will report to its requests
        logger.warning("Decoder layers cannot be compared with a program", exc_info=True)
        return False
    decoder.forward = NativeForward(decoder, program)
    has_scores = _use_generation_step(program, batch_processor, sampler)
    logger.info(
        "%d decoder layers%s are run as one call of the kernel library (compared with "
        "transformers' modules, or equal to what was, in %.2f s)",
        len(decoder.layers),
        " and the LM head" if has_scores else "",
        time.monotonic() - started_s,
    )
    return True


def _use_generation_step(
    program: ModelProgram, batch_processor: Any, sampler: BatchPlanner
) -> bool:
    """Have the program compute whole steps if it can; return whether it does."""
    inputs = batch_processor.inputs_and_outputs
    if not program.vocabulary or not is_supported(inputs, batch_processor.model_runner):
        return False
    batch = BatchInputs(inputs, batch_processor.cache, sampler.plan)
    inputs.prepare_batch_tensors = batch.prepare
    batch_processor._generation_step = GenerationStep(
        program,
        batch,
        [RotaryTable(call) for call in program.rotary_calls],
        sampler,
        HighestScores(load()),
        inputs.output_ids,
    )
    return True


def restore_modules(model: Any) -> None:
    """Undo `use_native_step`, whose program keeps the cache of its batcher alive."""
    decoder = _decoder_of(model)
    if decoder is not None:
        decoder.__dict__.pop("forward", None)


def _decoder_of(model: Any) -> Any:
    """Return the module with the decoder layers, if the model has it where most families do."""
    decoder = getattr(model, model.base_model_prefix, None)
    names = ("layers", "norm", "embed_tokens")
    return decoder if all(hasattr(decoder, name) for name in names) else None


def _build(model: Any, decoder: Any, batch_processor: Any) -> ModelProgram:
    memory = ProgramMemory.from_environment(load().path)
    with torch.no_grad():
        program = _rebuild(model, decoder, batch_processor.cache, memory)
        if program is None:
            program = _compare_in_turn(model, decoder, batch_processor, memory)
    program.bind(bound_computers(model))
    return program


def _rebuild(model: Any, decoder: Any, cache: Any, memory: ProgramMemory) -> ModelProgram | None:
    """Return the program of a model of whose like one was compared before; None without."""
    found = memory.recall(model, decoder)
    if found is None:
        return None
    try:
        program = ModelProgram(decoder, cache, LayerDescriber(cache), found, FixedExperts())
        program.add_head(model, decoder.norm, found)
    except UnrecognizedLayer as reason:
        logger.warning("What was found about an equal model does not fit this one: %s", reason)
        return None
    return program


def _compare_in_turn(
    model: Any, decoder: Any, batch_processor: Any, memory: ProgramMemory
) -> ModelProgram:
    """Compare, unless another router has done so meanwhile."""
    with memory.turn(model) as has_waited:
        if has_waited:
            program = _rebuild(model, decoder, batch_processor.cache, memory)
            if program is not None:
                return program
        program = _compare(model, decoder, batch_processor)
        memory.remember(model, decoder, program.found())
        return program


def _compare(model: Any, decoder: Any, batch_processor: Any) -> ModelProgram:
    """Return the program of a model whose modules were seen to compute the same."""
    experts = FixedExperts()
    cache = batch_processor.cache
    with substituted_computer(model, experts), one_thread():
        for i, seen in enumerate(observe_passes(model, decoder, batch_processor, experts)):
            if i == 0:
                describer = LayerDescriber(cache)
                program = ModelProgram(decoder, cache, describer, seen, experts)
                program.add_head(model, decoder.norm, seen)
            program.verify(seen)
    return program


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on this thread alone.

    Of a few rows, waking others takes longer than computing; and a process that has run a parallel
    region must not fork.
    """
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


class NativeForward:
    """The decoder's forward.

    Args:
        decoder: the module whose forward it replaces.
        program: its layers.
    """

    def __init__(self, decoder: Any, program: ModelProgram) -> None:
        self._decoder = decoder
        self._modules_forward: Callable[..., Any] = decoder.forward
        self._program = program

    def __call__(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the decoder's output; without a paged cache by its modules."""
        if kwargs.get("cache") is None or position_ids is None or input_ids is None:
            return self._modules_forward(
                input_ids=input_ids,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                **kwargs,
            )
        hidden = self._program.embed(input_ids)  # [1, T, H]
        angles = [call.angles(hidden, position_ids) for call in self._program.rotary_calls]
        self._program.run_step(hidden[0], angles, self._program.describe_groups(kwargs))
        return self._program.output_type(last_hidden_state=self._decoder.norm(hidden))
