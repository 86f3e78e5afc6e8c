import asyncio

import pytest

from faasmoe_router.engine.ending import Ending
from faasmoe_router.engine.generation import Delta, Generation, GenerationRequest
from faasmoe_router.engine.sequence import Sequence
from faasmoe_router.engine.text import TextCodec
from faasmoe_router.errors import GenerationFailed

END = 0


def _sequence(codec: TextCodec, request: GenerationRequest) -> Sequence:
    return Sequence(
        request, detokenizer=codec.detokenizer(), end_ids=request.ending.end_ids((END, 1))
    )


def _request(stops: tuple[str, ...] = (), *, max_tokens: int = 99) -> GenerationRequest:
    return GenerationRequest((5,), max_tokens=max_tokens, ending=Ending(stops=stops))


def test_text_ends_before_a_stop_string_across_tokens(codec: TextCodec) -> None:
    sequence = _sequence(codec, _request(("XYZ",)))
    deltas = [sequence.take([token]) for token in codec.encode("aXbXYZ")]
    assert "".join(delta.text for delta in deltas) == "aXb"
    assert [delta.finish_reason for delta in deltas] == [None] * 5 + ["stop"]
    assert sequence.n_tokens == 6


@pytest.mark.parametrize("end", [0, 1])
def test_any_end_token_ends_the_text_and_is_not_in_it(codec: TextCodec, end: int) -> None:
    delta = _sequence(codec, _request()).take([*codec.encode("ab"), end, 9])
    assert delta == Delta("ab", 3, "stop")


def test_what_was_held_back_is_told_at_the_end(codec: TextCodec) -> None:
    delta = _sequence(codec, _request(("XYZ",))).take([*codec.encode("aXY"), END])
    assert delta == Delta("aXY", 4, "stop")


def test_the_limit_ends_the_text(codec: TextCodec) -> None:
    delta = _sequence(codec, _request(max_tokens=2)).take(codec.encode("XYZ"))
    assert delta == Delta("XY", 2, "length")


def test_half_a_character_is_told_at_the_limit_only(codec: TextCodec) -> None:
    sequence = _sequence(codec, _request(max_tokens=3))
    ids = codec.encode("a日")[:3]
    assert [sequence.take([token]).text for token in ids] == ["a", "", "�"]


def test_end_token_is_text_like_any_other_when_ignored(codec: TextCodec) -> None:
    request = GenerationRequest((5,), max_tokens=3, ending=Ending(ignore_eos=True))
    delta = _sequence(codec, request).take([END, *codec.encode("ab")])
    assert delta == Delta("ab", 3, "length")


def test_a_generation_ends_when_all_its_sequences_have() -> None:
    async def read() -> list[tuple[int, Delta]]:
        generation = Generation(2, lambda: None)
        for index, reason in ((0, None), (1, "stop"), (0, "length")):
            generation.put(index, Delta("x", 1, reason))  # type: ignore[arg-type]
        return [event async for event in generation]

    assert [index for index, _ in asyncio.run(read())] == [0, 1, 0]


def test_a_failure_reaches_the_reader_and_frees_the_rest() -> None:
    cancelled: list[bool] = []

    async def read() -> None:
        generation = Generation(2, lambda: cancelled.append(True))
        generation.fail(GenerationFailed("lost"))
        async with generation:
            async for _ in generation:
                pass

    with pytest.raises(GenerationFailed, match="lost"):
        asyncio.run(read())
    assert cancelled == [True]
