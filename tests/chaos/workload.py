"""A workload whose expected responses are the greedy texts of a run without faults."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import aiohttp
from tests.chaos.tenants import ChaosTenant

N_TOKENS = 24
TIMEOUT_S = 120.0
PROMPTS = (
    "What is the capital of France?",
    "Name three colours.",
    "Why is the sky blue?",
    "Count from one to five.",
    "What do cats eat?",
    "Say hello in Spanish.",
    "How many days has a week?",
    "What is two plus two?",
    "Who wrote Hamlet?",
    "Tell me about the sea.",
    "What is bread made of?",
    "Name a planet.",
)


@dataclass(frozen=True, slots=True)
class TokenStall:
    """The time between two tokens of a stream.

    Attributes:
        begun_s: time of the first token (monotonic clock).
        took_s: time until the second token.
    """

    begun_s: float
    took_s: float


@dataclass(slots=True)
class WorkloadOutcome:
    """The outcome of all requests."""

    requests: int = 0
    completed: Counter[str] = field(default_factory=Counter)  # by tenant
    failures: list[str] = field(default_factory=list)
    wrong_responses: list[dict[str, str]] = field(default_factory=list)
    stalls: list[TokenStall] = field(default_factory=list)
    first_tokens_s: list[float] = field(default_factory=list)


class CheckedWorkload:
    """Closed-loop clients that compare every response with the expected one.

    Args:
        url: base URL of the router.
        model: name of the model.
        tenants: the tenants that send requests.
    """

    def __init__(self, url: str, model: str, tenants: Sequence[ChaosTenant]) -> None:
        self._url = url
        self._model = model
        self._tenants = tenants
        self.outcome = WorkloadOutcome()
        self.expected: dict[str, str] = {}

    async def record_expected(self) -> list[str]:
        """Record the expected responses without faults; return the questions without one.

        Each question is sent alone and concurrently with the others. If the responses differ, the
        composition of a batch decides a near-tie, and the question is not usable.
        """
        assignments = list(zip(PROMPTS, itertools.cycle(self._tenants), strict=False))
        async with self._session() as http:
            alone = {q: await self._chat(http, tenant, q) for q, tenant in assignments}
            concurrent = await asyncio.gather(
                *(self._chat(http, tenant, q) for q, tenant in assignments)
            )
        self.expected = {
            q: alone[q] for q, text in zip(PROMPTS, concurrent, strict=True) if alone[q] == text
        }
        self.outcome = WorkloadOutcome()
        return [q for q in PROMPTS if q not in self.expected]

    async def run(self, until: asyncio.Event, *, per_tenant: int) -> None:
        """Send requests until the event is set, `per_tenant` at a time for each tenant."""
        async with self._session() as http:
            clients = [
                self._chat_repeatedly(http, tenant, first, until)
                for n, tenant in enumerate(self._tenants)
                for first in range(n, n + per_tenant)
            ]
            await asyncio.gather(*clients)

    def _session(self) -> aiohttp.ClientSession:
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        return aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0))

    async def _chat_repeatedly(
        self, http: aiohttp.ClientSession, tenant: ChaosTenant, first: int, until: asyncio.Event
    ) -> None:
        questions = itertools.cycle(self.expected)
        for question in itertools.islice(questions, first, None):
            if until.is_set():
                return
            self.outcome.requests += 1
            try:
                text = await self._chat(http, tenant, question)
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                self.outcome.failures.append(f"{question} {type(error).__name__}: {error}")
                continue
            self.outcome.completed[tenant.name] += 1
            if text != self.expected[question]:
                self.outcome.wrong_responses.append(
                    {"question": question, "got": text, "expected": self.expected[question]}
                )

    async def _chat(self, http: aiohttp.ClientSession, tenant: ChaosTenant, question: str) -> str:
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": N_TOKENS,
            "temperature": 0,
            "stream": True,
        }
        url = f"{self._url}{tenant.path}/chat/completions"
        text, started_s = "", time.monotonic()
        last_s: float | None = None
        async with http.post(url, json=body, headers=tenant.headers) as response:
            if response.status != 200:
                raise ValueError(f"status {response.status}: {(await response.text())[:200]}")
            async for line in response.content:
                if not line.startswith(b"data: "):
                    continue  # a blank line, or a comment while nothing comes
                data = line.removeprefix(b"data: ").strip()
                if data == b"[DONE]":
                    return text
                event = json.loads(data)
                if "error" in event:
                    raise ValueError(str(event["error"]))
                chunk = event["choices"][0]["delta"].get("content") or ""
                if not chunk and not event["choices"][0]["finish_reason"]:
                    continue
                now_s = time.monotonic()
                if last_s is None:
                    self.outcome.first_tokens_s.append(now_s - started_s)
                else:
                    self.outcome.stalls.append(TokenStall(last_s, now_s - last_s))
                text, last_s = text + chunk, now_s
        raise ValueError("the stream ended without [DONE]")
