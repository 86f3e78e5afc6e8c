"""A workload whose right answers are known: greedy texts of an undisturbed run."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import aiohttp
from tests.chaos.tenants import Tenant

N_TOKENS = 24
TIMEOUT_S = 120.0
QUESTIONS = (
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
class Stall:
    """A time without a token, in a stream that runs."""

    begun_s: float
    took_s: float


@dataclass(slots=True)
class Outcome:
    """What came of the requests."""

    requests: int = 0
    answers: Counter[str] = field(default_factory=Counter)  # by tenant
    failures: list[str] = field(default_factory=list)
    wrong: list[dict[str, str]] = field(default_factory=list)
    stalls: list[Stall] = field(default_factory=list)
    first_tokens_s: list[float] = field(default_factory=list)


class Workload:
    """Tenants that ask one question after the other.

    Args:
        url: the router.
        model: the model's name.
        tenants: who asks.
    """

    def __init__(self, url: str, model: str, tenants: Sequence[Tenant]) -> None:
        self._url = url
        self._model = model
        self._tenants = tenants
        self.outcome = Outcome()
        self.expected: dict[str, str] = {}

    async def learn(self) -> list[str]:
        """Take the right answers from an undisturbed run; return the questions without one.

        Asked alone and among others: which requests share a batch may decide a near-tie, and such
        a question proves nothing.
        """
        askers = list(zip(QUESTIONS, itertools.cycle(self._tenants), strict=False))
        async with self._session() as http:
            alone = {q: await self._ask(http, tenant, q) for q, tenant in askers}
            among = await asyncio.gather(*(self._ask(http, tenant, q) for q, tenant in askers))
        self.expected = {
            q: alone[q] for q, text in zip(QUESTIONS, among, strict=True) if alone[q] == text
        }
        self.outcome = Outcome()
        return [q for q in QUESTIONS if q not in self.expected]

    async def run(self, until: asyncio.Event, *, per_tenant: int) -> None:
        """Ask until the event, each tenant several questions at a time."""
        async with self._session() as http:
            askers = [
                self._ask_on(http, tenant, first, until)
                for n, tenant in enumerate(self._tenants)
                for first in range(n, n + per_tenant)
            ]
            await asyncio.gather(*askers)

    def _session(self) -> aiohttp.ClientSession:
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        return aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0))

    async def _ask_on(
        self, http: aiohttp.ClientSession, tenant: Tenant, first: int, until: asyncio.Event
    ) -> None:
        questions = itertools.cycle(self.expected)
        for question in itertools.islice(questions, first, None):
            if until.is_set():
                return
            self.outcome.requests += 1
            try:
                text = await self._ask(http, tenant, question)
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                self.outcome.failures.append(f"{question} {type(error).__name__}: {error}")
                continue
            self.outcome.answers[tenant.name] += 1
            if text != self.expected[question]:
                self.outcome.wrong.append(
                    {"question": question, "got": text, "expected": self.expected[question]}
                )

    async def _ask(self, http: aiohttp.ClientSession, tenant: Tenant, question: str) -> str:
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": N_TOKENS,
            "temperature": 0,
            "stream": True,
        }
        url = f"{self._url}{tenant.path}/chat/completions"
        text, begun_s = "", time.monotonic()
        last_s: float | None = None
        async with http.post(url, json=body, headers=tenant.headers) as answer:
            if answer.status != 200:
                raise ValueError(f"status {answer.status}: {(await answer.text())[:200]}")
            async for line in answer.content:
                data = line.removeprefix(b"data: ").strip()
                if not data:
                    continue
                if data == b"[DONE]":
                    return text
                event = json.loads(data)
                if "error" in event:
                    raise ValueError(str(event["error"]))
                piece = event["choices"][0]["delta"].get("content") or ""
                if not piece and not event["choices"][0]["finish_reason"]:
                    continue
                now_s = time.monotonic()
                if last_s is None:
                    self.outcome.first_tokens_s.append(now_s - begun_s)
                else:
                    self.outcome.stalls.append(Stall(last_s, now_s - last_s))
                text, last_s = text + piece, now_s
        raise ValueError("the stream ended without [DONE]")
