import asyncio

from faasmoe_expert.server.api import HeapTrimmer
from faasmoe_expert.server.http import HttpRequest, HttpResponse


def respond(_: HttpRequest) -> HttpResponse:
    return HttpResponse.json_response(200, {})


def test_trims_the_heap_once_per_burst_of_requests() -> None:
    async def scenario() -> list[int]:
        n_trims, observed, done = [0], list[int](), asyncio.Event()

        def trim() -> None:
            n_trims[0] += 1
            done.set()

        trimmer = HeapTrimmer(respond, delay_s=0.01, trim=trim)
        for _ in range(2):
            for _ in range(3):
                response = trimmer.handle(HttpRequest())
                assert isinstance(response, HttpResponse)
                assert response.status == 200
            observed.append(n_trims[0])  # unchanged while requests are answered
            await done.wait()
            done.clear()
            observed.append(n_trims[0])
        return observed

    assert asyncio.run(scenario()) == [0, 1, 1, 2]
