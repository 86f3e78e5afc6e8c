"""Fixtures: a server of the tiny model on a loopback port, and clients of it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from copy import deepcopy
from typing import Any

import httpx
import openai
import pytest
from server_thread import running_server
from transformers import PreTrainedTokenizerFast

from faasmoe_gateway.server import Server
from faasmoe_router.api.app import create_app
from faasmoe_router.engine.batcher import EngineLimits
from faasmoe_router.engine.engine import Engine
from faasmoe_router.engine.tokenizer import ModelTokenizer
from faasmoe_router.metrics import EngineMetrics, new_registry
from faasmoe_router.version import system_fingerprint

DEADLINE_S = 120.0
MODEL = "tiny"
TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>system\nCall as <tool_call>{...}</tool_call>: "
    "{% for tool in tools %}{{ tool.function.name }} {% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function.name }}"
    "{{ call.function.arguments | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{{ reasoning_effort or '' }}{{ mood or '' }}{% endif %}"
)


@pytest.fixture(scope="session")
def server(base_model: Any, model_tokenizer: ModelTokenizer) -> Iterator[tuple[str, Engine]]:
    registry = new_registry()
    engine = Engine(
        base_model,
        model_tokenizer,
        limits=EngineLimits(max_model_len=256, max_num_seqs=4, max_waiting=8),
        metrics=EngineMetrics(registry, MODEL),
    )
    app = create_app(
        engine,
        model_name=MODEL,
        registry=registry,
        fingerprint=system_fingerprint("sha256:0", base_model),
        max_body_bytes=20_000,
    )
    with running_server(
        Server(app, on_drain_timeout=engine.abort_running, drain_timeout_s=0)
    ) as url:
        yield url, engine


def codec_with_template(tokenizer: Any, chat_template: str) -> ModelTokenizer:
    """Return the tiny tokenizer with another chat template."""
    return ModelTokenizer(
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.backend_tokenizer,
            eos_token="<|end|>",
            chat_template=chat_template,
        )
    )


ServeTemplate = Callable[[str], str]


@pytest.fixture(scope="session")
def serve_template(base_model: Any, tokenizer: Any) -> Iterator[ServeTemplate]:
    """Return a function that serves the tiny model with a chat template; it returns the URL."""
    urls: dict[str, str] = {}
    with ExitStack() as stack:

        def serve(chat_template: str) -> str:
            if chat_template not in urls:
                registry = new_registry()
                engine = Engine(
                    deepcopy(base_model),
                    codec_with_template(tokenizer, chat_template),
                    limits=EngineLimits(max_model_len=1024, max_num_seqs=4, max_waiting=8),
                    metrics=EngineMetrics(registry, MODEL),
                )
                server = Server(
                    create_app(engine, model_name=MODEL, registry=registry),
                    on_drain_timeout=engine.abort_running,
                    drain_timeout_s=0,
                )
                urls[chat_template] = stack.enter_context(running_server(server))
            return urls[chat_template]

        yield serve


@pytest.fixture(scope="session")
def tool_codec(tokenizer: Any) -> ModelTokenizer:
    """The tokenizer with a chat template that supports tools."""
    return codec_with_template(tokenizer, TOOL_TEMPLATE)


@pytest.fixture(scope="session")
def tool_server(base_model: Any, tool_codec: ModelTokenizer) -> Iterator[str]:
    registry = new_registry()
    engine = Engine(
        deepcopy(base_model),
        tool_codec,
        limits=EngineLimits(max_model_len=1024, max_num_seqs=4, max_waiting=8),
        metrics=EngineMetrics(registry, MODEL),
    )
    app = create_app(
        engine,
        model_name=MODEL,
        registry=registry,
        fingerprint=system_fingerprint("sha256:0", base_model),
    )
    with running_server(
        Server(app, on_drain_timeout=engine.abort_running, drain_timeout_s=0)
    ) as url:
        yield url


@pytest.fixture
def engine(server: tuple[str, Engine]) -> Engine:
    return server[1]


@pytest.fixture
def http(server: tuple[str, Engine]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server[0], timeout=DEADLINE_S) as client:
        yield client


@pytest.fixture
def client(server: tuple[str, Engine]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server[0]}/v1", api_key="none", max_retries=0, timeout=DEADLINE_S
    ) as client:
        yield client
