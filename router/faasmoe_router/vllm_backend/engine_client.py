"""vLLM's engine client with tenants: admission, fair places, prefix isolation and accounts.

vLLM's OpenAI app calls `generate` with the tokens of a prompt. What a request may do is decided
there, before anything is computed; what it used is read from the engine's outputs.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, ClassVar

from vllm.exceptions import VLLMServerError
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM

from faasmoe_router.api.admission import TenantAdmission
from faasmoe_router.engine.generation import GenerationRequest
from faasmoe_router.errors import GenerationFailed, RequestTooLarge
from faasmoe_router.tenants.service import NoTenants
from faasmoe_router.vllm_backend.fair_gate import FairGate
from faasmoe_router.vllm_backend.generation_span import GenerationTrace
from faasmoe_router.vllm_backend.request_account import REQUEST, RequestAccount, RequestContext

ABORTED = "abort"
"""vLLM's finish reason of a request that was neither finished nor left by its client."""


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
    _aborts: ClassVar[set[asyncio.Future[None]]] = set()

    def generate(
        self,
        prompt: Any,
        sampling_params: SamplingParams,
        request_id: str,
        *,
        priority: int = 0,
        **options: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Admit a request, and return the stream of its outputs; see vLLM's `AsyncLLM.generate`.

        No coroutine, so that a request is refused before its response begins.

        Raises:
            RouterError: the tenant's limits or the queue do not admit the request now.
        """
        context = REQUEST.get() or RequestContext()
        caller = context.caller
        n_prompt = len(_prompt_token_ids(prompt))
        params = _limited(sampling_params, context, n_prompt, self.model_config.max_model_len)
        self.gate.check_capacity(caller.tenant)
        choice = GenerationRequest((), params.max_tokens or 1)
        recorder = self.admission.admit(caller, [choice] * params.n, n_prompt=n_prompt)
        context.headers.update(recorder.headers)
        salt = self.gate.cache_salt(caller.tenant, prompt.get("cache_salt"))
        if salt is not None:
            prompt = {**prompt, "cache_salt": salt}
        trace = GenerationTrace(context.span, n_prompt)
        run = RequestAccount(caller.tenant, f"{next(self._numbers)}", n_prompt, recorder, trace)
        return self._outputs(run, prompt, params, request_id, priority, options)

    async def _outputs(
        self,
        run: RequestAccount,
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
                run.trace.begin(params)
                if deadline_s < float("inf"):
                    timer = loop.call_at(deadline_s, self._start_abort, request_id)
                outputs = super().generate(
                    prompt,
                    params,
                    request_id,
                    priority=self.gate.priority(run.tenant),
                    **options,
                )
                async with aclosing(outputs):
                    async for output in outputs:
                        if any(choice.finish_reason == ABORTED for choice in output.outputs):
                            raise GenerationFailed(self._abort_reason(loop.time() >= deadline_s))
                        self._account(run, output, params)
                        yield output
        except (GenerationFailed, VLLMServerError):
            run.recorder.record_failure()
            raise
        finally:
            if timer is not None:
                timer.cancel()
            run.trace.end()
            run.recorder.finish()

    async def release_cache(self) -> None:
        """Drop all cached prefixes and free the KV cache's memory, unless a request needs it.

        Requests that arrive meanwhile wait.
        """
        if self.gate.n_requests:
            return
        with self.gate.pause():
            if await self.reset_prefix_cache():
                await self.collective_rpc("faasmoe_release_cache")

    def _start_abort(self, request_id: str) -> None:
        task = asyncio.ensure_future(self.abort(request_id))
        self._aborts.add(task)
        task.add_done_callback(self._aborts.discard)

    def _abort_reason(self, is_overdue: bool) -> str:
        if is_overdue:
            return f"the request was not finished within {self.request_timeout_s:g} s"
        return "the server is shutting down"

    def _account(self, run: RequestAccount, output: RequestOutput, params: SamplingParams) -> None:
        n_computed, n_generated = run.add(
            output.outputs,
            n_cached=output.num_cached_tokens or 0,
            is_delta=params.output_kind is RequestOutputKind.DELTA,
        )
        self.gate.charge(run.tenant, run.id, n_computed=n_computed, n_generated=n_generated)


def _prompt_token_ids(prompt: Any) -> list[int]:
    """Return the tokens of a rendered prompt; raises RequestTooLarge for one without tokens."""
    ids = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else None
    if ids is None:
        raise RequestTooLarge("prompts are counted in tokens: this one has embeddings only")
    return list(ids)


def _limited(
    params: SamplingParams, request: RequestContext, n_prompt: int, max_model_len: int
) -> SamplingParams:
    """Return the parameters within the caller's limits; raises RequestTooLarge.

    What a request sets itself is not lowered but refused, here or at admission.
    """
    caller = request.caller
    context = caller.effective_max_model_len(max_model_len)
    n_needed = (params.max_tokens or 1) if request.has_token_limit else 1
    if n_prompt + n_needed > context:
        raise RequestTooLarge(
            f"the prompt has {n_prompt} tokens, and {n_needed} more are to be generated, expected "
            f"at most {context} together"
        )
    if request.has_token_limit:
        return params
    limits = [context - n_prompt, params.max_tokens, caller.max_output_tokens]
    if caller.max_request_tokens is not None:
        limits.append((caller.max_request_tokens - n_prompt) // params.n)
    limited = params.clone()
    limited.max_tokens = max(1, min(limit for limit in limits if limit is not None))
    return limited
