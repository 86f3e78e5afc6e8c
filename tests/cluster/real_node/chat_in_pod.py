"""Chats with a model's Service, once or until a host name resolves; runs in a pod.

    chat_in_pod.py URL MODEL KEY PROMPT [UNTIL]

The termination message has the number of each text, and the errors.
"""

import json
import socket
import sys
import time
from collections import Counter
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

TIMEOUT_S = 240
COLD_START_S = 240.0
SERVICE_UNAVAILABLE = 503
TERMINATION_LOG = "/dev/termination-log"
N_ERRORS = 5


def chat(url: str, model: str, key: str, prompt: str) -> str:
    """Return the model's answer; raises URLError."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": 8,
        "temperature": 0,
    }
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = Request(f"{url}/chat/completions", json.dumps(body).encode(), headers)
    with urlopen(request, timeout=TIMEOUT_S) as answer:
        return str(json.load(answer)["choices"][0]["message"]["content"])


def chat_patiently(url: str, model: str, key: str, prompt: str) -> str:
    """Return the model's answer, asking again while functions start slowly, as clients do."""
    deadline_s = time.monotonic() + COLD_START_S
    while True:
        try:
            return chat(url, model, key, prompt)
        except HTTPError as error:
            if error.code != SERVICE_UNAVAILABLE or time.monotonic() > deadline_s:
                raise
            time.sleep(float(error.headers["Retry-After"]))


def resolves(host: str) -> bool:
    """Return whether a host name resolves."""
    try:
        socket.getaddrinfo(host, 80)
    except OSError:
        return False
    return True


def main(url: str, model: str, key: str, prompt: str, until: str = "") -> None:
    """Chat and write the results to the termination log."""
    texts: Counter[str] = Counter()
    errors = []
    ask = chat if until else chat_patiently
    while True:
        try:
            texts[ask(url, model, key, prompt)] += 1
        except (URLError, OSError, ValueError) as error:
            errors.append(f"{type(error).__name__}: {error}"[:200])
        if not until or resolves(until):
            break
    with open(TERMINATION_LOG, "w") as log:
        json.dump({"texts": texts, "n_errors": len(errors), "errors": errors[:N_ERRORS]}, log)


if __name__ == "__main__":
    main(*sys.argv[1:])
