"""What the metrics say of the KV cache, by which gateways choose a router."""

import asyncio
from collections.abc import Callable
from typing import Any

from faasmoe_router.engine.batcher import TOKENS_PER_PAGE, KVCacheGeometry
from faasmoe_router.engine.engine import Engine
from faasmoe_router.engine.generation import GenerationRequest


def test_usage_follows_the_sequences_that_run(
    make_engine: Callable[..., Engine], model: Any, prompt_ids: tuple[int, ...]
) -> None:
    engine = make_engine()
    prompt = prompt_ids * (2 * TOKENS_PER_PAGE // len(prompt_ids))
    request = GenerationRequest(prompt, max_tokens=100)

    async def observe() -> tuple[float, float, float]:
        async with engine:
            before = engine.kv_cache_usage()
            async with engine.generate([request]) as generation:
                await anext(aiter(generation))
                during = engine.kv_cache_usage()
            return before, during, engine.kv_cache_usage()

    before, during, after = asyncio.run(observe())
    assert before == after == 0.0
    n_pages = engine.limits.n_pages(KVCacheGeometry.from_model(model))
    least_pages = -(-len(prompt) // TOKENS_PER_PAGE)
    assert least_pages / n_pages <= during <= (least_pages + 4) / n_pages
