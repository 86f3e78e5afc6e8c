import asyncio

from faasmoe_expert.server.api import HeapTrimmer
from faasmoe_expert.server.http import HttpRequest, HttpResponse


def answer(_: HttpRequest) -> HttpResponse:
    return HttpResponse.json_response(200, {})


def test_gives_memory_back_once_for_the_requests_of_a_moment() -> None:
    async def run() -> list[int]:
        given, seen, done = [0], list[int](), asyncio.Event()

        def give_back() -> None:
            given[0] += 1
            done.set()

        tidy = HeapTrimmer(answer, delay_s=0.01, trim=give_back)
        for _ in range(2):
            for _ in range(3):
                answered = tidy.handle(HttpRequest())
                assert isinstance(answered, HttpResponse)
                assert answered.status == 200
            seen.append(given[0])  # not while requests are answered
            await done.wait()
            done.clear()
            seen.append(given[0])
        return seen

    assert asyncio.run(run()) == [0, 1, 1, 2]
