"""`make demo`: builds the demo model, serves it with `faasmoe up`, and chats with it.

It runs the commands that a user would run, and the unmodified openai client. With `--serve` the
model stays up after the chat until Ctrl-C.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
from openai import OpenAI

ROOT = Path(__file__).parent.parent
FAASMOE = (sys.executable, "-m", "faasmoe_operator.cli")
MODEL_DIR = ROOT / ".faasmoe" / "demo-model"
QUESTION = "What is the capital of France? Answer in one sentence."
START_TIMEOUT_S = 600.0
END_TIMEOUT_S = 60.0


def main() -> int:
    """Run the demo and return the exit status of `faasmoe up`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", action="store_true", help="stay up until Ctrl-C")
    parser.add_argument("--port", type=int, default=8000, help="API port (default: %(default)s)")
    arguments = parser.parse_args()
    say("demo model: SmolLM2-135M-Instruct, converted to a Qwen2-MoE with 30 layers")
    subprocess.run([*FAASMOE, "demo-model", str(MODEL_DIR)], check=True)
    say("faasmoe up -f examples/demo.yaml")
    up = subprocess.Popen(
        [*FAASMOE, "up", "-f", str(ROOT / "examples" / "demo.yaml"), "--port", str(arguments.port)]
    )
    try:
        base_url = f"http://127.0.0.1:{arguments.port}"
        wait_until_healthy(base_url, up)
        chat(base_url)
        show_calls(base_url)
        if arguments.serve:
            say("serving; press Ctrl-C to stop")
            up.wait()
    except KeyboardInterrupt:
        say("Ctrl-C")
    finally:
        up.send_signal(signal.SIGINT)
        status = up.wait(END_TIMEOUT_S)
    say(f"faasmoe up ended with status {status}")
    return status


def wait_until_healthy(base_url: str, up: subprocess.Popen[bytes]) -> None:
    """Wait until the router is healthy; raises RuntimeError if it exits or takes too long."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        if up.poll() is not None:
            raise RuntimeError(f"faasmoe up ended with status {up.returncode}")
        try:
            if httpx.get(f"{base_url}/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"the router was not healthy within {START_TIMEOUT_S:.0f} s")


def chat(base_url: str) -> None:
    """Ask one question and print the response as it streams."""
    with OpenAI(base_url=f"{base_url}/v1", api_key="none") as client:
        model = client.models.list().data[0].id
        say(f"chat with {model!r}: {QUESTION}")
        start_s = time.monotonic()
        token_times_s: list[float] = []  # since the request; a chunk with text is a token
        for chunk in client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": QUESTION}],
            max_tokens=64,
            temperature=0,
            stream=True,
        ):
            text = chunk.choices[0].delta.content
            if text:
                token_times_s.append(time.monotonic() - start_s)
                print(text, end="", flush=True)
        print()
        say(describe_speed(token_times_s))


def describe_speed(token_times_s: Sequence[float]) -> str:
    """Return the time to the first token and the speed after it, of tokens at these times."""
    if not token_times_s:
        return "no tokens"
    first_s, last_s, n_tokens = token_times_s[0], token_times_s[-1], len(token_times_s)
    text = f"first token after {first_s:.2f} s, {n_tokens / last_s:.1f} tokens/s with it"
    if n_tokens > 1:
        text += f", {(n_tokens - 1) / (last_s - first_s):.1f} tokens/s after it"
    return text


def show_calls(base_url: str) -> None:
    """Print the number of function calls that the chat took, and the state of the functions."""
    counts = {
        name: float(value)
        for name, _, value in (
            line.rpartition(" ")
            for line in httpx.get(f"{base_url}/metrics").text.splitlines()
            if not line.startswith("#")
        )
    }
    calls = counts["faasmoe_router_function_calls_total"]
    local = counts["faasmoe_router_local_computations_total"]
    say(f"function calls: {calls:.0f}; computed in the router instead: {local:.0f}")
    subprocess.run([*FAASMOE, "top", "--once"], check=True)


def say(text: str) -> None:
    """Print a line with a prefix that sets it apart from the output of commands."""
    print(f"\n==> {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
