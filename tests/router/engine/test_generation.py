"""Streaming of outputs from several sequences to one reader."""

import asyncio

import pytest

from faasmoe_router.engine.generation import CompletionOutput, Generation
from faasmoe_router.errors import GenerationFailed


def test_stream_ends_when_all_sequences_finish() -> None:
    async def scenario() -> list[tuple[int, CompletionOutput]]:
        generation = Generation(2, lambda: None)
        for index, reason in ((0, None), (1, "stop"), (0, "length")):
            generation.put_output(index, CompletionOutput("x", 1, reason))  # type: ignore[arg-type]
        return [event async for event in generation]

    assert [index for index, _ in asyncio.run(scenario())] == [0, 1, 0]


def test_failure_reaches_the_reader_and_cancels_the_rest() -> None:
    cancelled: list[bool] = []

    async def scenario() -> None:
        generation = Generation(2, lambda: cancelled.append(True))
        generation.fail(GenerationFailed("lost"))
        async with generation:
            async for _ in generation:
                pass

    with pytest.raises(GenerationFailed, match="lost"):
        asyncio.run(scenario())
    assert cancelled == [True]
