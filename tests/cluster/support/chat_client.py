"""Chats with a model's router by the OpenAI client."""

from __future__ import annotations

from apiserver import Object
from openai import OpenAI

PROMPT = "the quick brown fox"
TIMEOUT_S = 60.0


def chat(
    router: Object, *, model: str = "tiny", tenant: str = "", key: str = "none", n_tokens: int = 8
) -> str:
    """Return the model's greedy answer; raises the client's errors.

    Args:
        router: the pod of a router or a gateway.
        model: model name in the request.
        tenant: tenant whose path is used; empty for the common path.
        key: the API key.
        n_tokens: tokens to generate.
    """
    path = f"{tenant}/v1" if tenant else "v1"
    url = f"http://{router['status']['podIP']}:8000/{path}"
    with OpenAI(base_url=url, api_key=key, max_retries=0, timeout=TIMEOUT_S) as client:
        answer = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": PROMPT}],
            max_tokens=n_tokens,
            temperature=0,
        )
    return answer.choices[0].message.content or ""
