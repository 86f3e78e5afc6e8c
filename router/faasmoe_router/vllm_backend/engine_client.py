"""vLLM's engine client with tenants: admission, fair places, prefix isolation and accounts.

vLLM's OpenAI app calls `generate` with the tokens of a prompt. What a request may do is decided
there, before anything is computed; what it used is read from the engine's outputs.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM

from faasmoe_router.api.admission import TenantAdmission
from faasmoe_router.engine.generation import GenerationRequest
from faasmoe_router.errors import GenerationFailed, RequestTooLarge
from faasmoe_router.tenants.service import ANONYMOUS, Caller, NoTenants, RequestUsageRecorder
from faasmoe_router.vllm_backend.fair_gate import FairGate


@dataclass(slots=True)
class RequestContext:
    """What is known of an HTTP request where vLLM calls its engine.

    Attributes:
        caller: who sent it.
        headers: headers to add to its response.
    """

    caller: Caller = ANONYMOUS
    headers: dict[str, str] = field(default_factory=dict)


REQUEST: ContextVar[RequestContext | None] = ContextVar("faasmoe_request", default=None)
"""The HTTP request that the running task serves."""


class TenantEngine(AsyncLLM):
    """vLLM's asynchronous engine, whose requests belong to tenants.

    Attributes:
        gate: the places of the batch.
        admission: the tenants' limits.
        request_timeout_s: seconds after which a request fails.
    """

    gate: FairGate
    admission: TenantAdmission = NoTenants()
    request_timeout_s: float = float("inf")
    _numbers = itertools.count()

    def generate(  # type: ignore[override]  # a function, so that admission precedes the response
        self,
        prompt: Any,
        sampling_params: SamplingParams,
        request_id: str,
        *,
        priority: int = 0,
        **options: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Admit a request, and return the stream of its outputs; see vLLM's `AsyncLLM.generate`.

        Raises:
            RouterError: the tenant's limits or the queue do not admit the request now.
        """
        context = REQUEST.get() or RequestContext()
        caller = context.caller
        n_prompt = len(_prompt_token_ids(prompt))
        params = _limited(sampling_params, caller, n_prompt, self.model_config.max_model_len)
        self.gate.check_capacity(caller.tenant)
        choice = GenerationRequest((), params.max_tokens or 1)
        recorder = self.admission.admit(caller, [choice] * params.n, n_prompt=n_prompt)
        context.headers.update(recorder.headers)
        salt = self.gate.cache_salt(caller.tenant, prompt.get("cache_salt"))
        if salt is not None:
            prompt = {**prompt, "cache_salt": salt}
        run = _Run(caller.tenant, f"{next(self._numbers)}", n_prompt, recorder)
        return self._outputs(run, prompt, params, request_id, priority, options)

    async def _outputs(
        self,
        run: _Run,
        prompt: Any,
        params: SamplingParams,
        request_id: str,
        priority: int,
        options: dict[str, Any],
    ) -> AsyncGenerator[RequestOutput, None]:
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + self.request_timeout_s
        timer = None
        try:
            async with self.gate.place(
                run.tenant, run.id, n_prompt_tokens=run.n_prompt, priority=priority
            ):
                run.recorder.record_started()
                if deadline_s < float("inf"):
                    timer = loop.call_at(
                        deadline_s, lambda: asyncio.ensure_future(self.abort(request_id))
                    )
                outputs = super().generate(
                    prompt,
                    params,
                    request_id,
                    priority=self.gate.priority(run.tenant),
                    **options,
                )
                async for output in outputs:
                    self._account(run, output, params)
                    if loop.time() >= deadline_s and not output.finished:
                        raise GenerationFailed(
                            f"the request was not finished within {self.request_timeout_s:g} s"
                        )
                    yield output
        except GenerationFailed:
            run.recorder.record_failure()
            raise
        finally:
            if timer is not None:
                timer.cancel()
            run.recorder.finish()

    def _account(self, run: _Run, output: RequestOutput, params: SamplingParams) -> None:
        """Record the tokens that an output adds."""
        n_computed = n_generated = 0
        if not run.is_prompt_computed:
            run.is_prompt_computed = True
            n_computed = run.n_prompt - (output.num_cached_tokens or 0)
        for choice in output.outputs:
            n_before = run.n_tokens.get(choice.index, 0)
            is_delta = params.output_kind is RequestOutputKind.DELTA
            n_now = n_before + len(choice.token_ids) if is_delta else len(choice.token_ids)
            run.n_tokens[choice.index] = n_now
            is_last = choice.finish_reason is not None and choice.index not in run.finished
            if is_last:
                run.finished.add(choice.index)
            run.recorder.record_tokens(n_now - n_before, is_last=is_last)
            n_generated += n_now - n_before
        self.gate.charge(
            run.tenant,
            run.id,
            n_computed=n_computed + n_generated,
            n_generated=n_generated,
        )


@dataclass(slots=True)
class _Run:
    """A request between its admission and its last output."""

    tenant: str
    id: str
    n_prompt: int
    recorder: RequestUsageRecorder
    n_tokens: dict[int, int] = field(default_factory=dict)
    finished: set[int] = field(default_factory=set)
    is_prompt_computed: bool = False


def _prompt_token_ids(prompt: Any) -> list[int]:
    """Return the tokens of a rendered prompt; raises RequestTooLarge for one without tokens."""
    ids = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else None
    if ids is None:
        raise RequestTooLarge("prompts are counted in tokens: this one has embeddings only")
    return list(ids)


def _limited(
    params: SamplingParams, caller: Caller, n_prompt: int, max_model_len: int
) -> SamplingParams:
    """Return the parameters within the caller's limits; raises RequestTooLarge."""
    context = caller.effective_max_model_len(max_model_len)
    if n_prompt >= context:
        raise RequestTooLarge(
            f"the prompt has {n_prompt} tokens, expected less than {context}, your limit of prompt "
            "and output"
        )
    limits = [context - n_prompt, caller.max_output_tokens, params.max_tokens]
    limited = params.clone()
    limited.max_tokens = min(limit for limit in limits if limit is not None)
    return limited
