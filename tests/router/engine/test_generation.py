import asyncio

import pytest

from faasmoe_router.engine.choosing import Choosing
from faasmoe_router.engine.ending import Ending
from faasmoe_router.engine.generation import Delta, Generation, GenerationRequest
from faasmoe_router.engine.logprobs import TokenLogprob
from faasmoe_router.engine.sequence import Sequence
from faasmoe_router.engine.steps import Steps
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


def test_a_stop_token_ends_the_text_even_where_end_tokens_are_ignored(codec: TextCodec) -> None:
    [stop] = codec.encode("z")
    request = GenerationRequest((5,), 9, ending=Ending(stop_ids=(stop,), ignore_eos=True))
    delta = _sequence(codec, request).take([*codec.encode("ab"), END, stop, 9])
    assert delta == Delta("ab", 4, "stop", stop_reason=stop)


def test_what_ends_the_text_is_in_it_if_asked_for(codec: TextCodec) -> None:
    tokens = codec.encode("aXYb")
    ending = Ending(stops=("XY",), included=True)
    sequence = _sequence(codec, GenerationRequest((5,), 9, ending=ending))
    assert sequence.take(tokens) == Delta("aXY", 3, "stop", stop_reason="XY")
    ending = Ending(stop_ids=(tokens[1],), included=True)
    sequence = _sequence(codec, GenerationRequest((5,), 9, ending=ending))
    assert sequence.take(tokens) == Delta("aX", 2, "stop", stop_reason=tokens[1])


def test_stop_strings_count_after_the_least_tokens_only(codec: TextCodec) -> None:
    ending = Ending(stops=("X",), min_tokens=2)
    sequence = _sequence(codec, GenerationRequest((5,), 9, ending=ending))
    assert sequence.take(codec.encode("aXbXc")) == Delta("aXb", 4, "stop", stop_reason="X")


def test_log_probabilities_come_with_the_text_that_they_are_of(codec: TextCodec) -> None:
    """Held back with it, where it may begin a stop string, and dropped with the stop string."""
    ids = codec.encode("aXYXYZ")
    request = GenerationRequest(
        (5,), 9, choosing=Choosing(n_logprobs=0), ending=Ending(stops=("XYZ",))
    )
    steps = Steps(request, [])
    assert steps.logprobs is not None
    for token in ids:
        steps.logprobs.put(TokenLogprob(token, -1.0))
    sequence = Sequence(request, detokenizer=codec.detokenizer(), end_ids=(), steps=steps)
    deltas = [sequence.take([token]) for token in ids]
    told = [[(at, entry.token) for at, entry in delta.logprobs] for delta in deltas]
    assert [delta.text for delta in deltas] == ["a", "", "", "XY", "", ""]
    assert told == [[(0, ids[0])], [], [], [(1, ids[1]), (2, ids[2])], [], []]


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
