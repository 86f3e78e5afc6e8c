"""Unmodified client libraries against `faasmoe up`; run by `make test-clients`.

Each test is one use of one client, as its documentation shows it. The model is random: schemas are
closed, so that structured answers end.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
KEY = "sk-clients"
TIMEOUT_S = 600  # of what takes seconds on an idle machine
USER: list[Any] = [{"role": "user", "content": "the quick brown fox"}]


class Place(BaseModel):
    """A place."""

    model_config = ConfigDict(extra="forbid")

    city: Literal["Rome", "Oslo"]


CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"], "type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
NAMED: Any = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clients")


@pytest.fixture(scope="session")
def root_url(folder: Path) -> Iterator[str]:
    """The URL of a running `faasmoe up`."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    log = folder / "up.log"
    python = Path(os.environ["FAASMOE_PYTHON"]).absolute()
    command = [str(python), str(HERE / "serve.py"), str(folder), str(port), KEY]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT)
    try:
        end_s = time.monotonic() + TIMEOUT_S
        while "OpenAI base URL" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end_s, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="session")
def url(root_url: str) -> str:
    return f"{root_url}/v1"


@pytest.fixture(scope="session")
def openai_client(url: str) -> Any:
    import openai

    return openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=TIMEOUT_S)


def test_openai_chat(openai_client: Any) -> None:
    answer = openai_client.chat.completions.create(model="tiny", messages=USER, max_tokens=8)
    assert answer.choices[0].message.content
    assert [model.id for model in openai_client.models.list()] == ["tiny"]


def test_openai_chat_stream(openai_client: Any) -> None:
    body: Any = {"model": "tiny", "messages": USER, "stream": True, "max_tokens": 8}
    chunks = list(openai_client.chat.completions.create(**body))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "length"


def test_openai_chat_stream_helper(openai_client: Any) -> None:
    with openai_client.chat.completions.stream(
        model="tiny", messages=USER, max_tokens=200, response_format=Place
    ) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        answer = stream.get_final_completion().choices[0].message
    assert "".join(deltas) == answer.content
    assert isinstance(answer.parsed, Place)


def test_openai_parse(openai_client: Any) -> None:
    answer = openai_client.chat.completions.parse(
        model="tiny", messages=USER, max_tokens=200, response_format=Place
    )
    assert isinstance(answer.choices[0].message.parsed, Place)


def test_openai_tools(openai_client: Any) -> None:
    answer = openai_client.chat.completions.create(
        model="tiny", messages=USER, max_tokens=400, tools=[TOOL], tool_choice=NAMED
    )
    [call] = answer.choices[0].message.tool_calls
    Place.model_validate_json(call.function.arguments)


def test_openai_responses(openai_client: Any) -> None:
    answer = openai_client.responses.create(model="tiny", input="fox", max_output_tokens=8)
    assert answer.output_text


def test_openai_responses_stream(openai_client: Any) -> None:
    with openai_client.responses.stream(model="tiny", input="fox", max_output_tokens=8) as stream:
        kinds = [event.type for event in stream]
    assert (kinds[0], kinds[-1]) == ("response.created", "response.incomplete")


def test_openai_responses_parse(openai_client: Any) -> None:
    answer = openai_client.responses.parse(
        model="tiny", input="fox", max_output_tokens=200, text_format=Place
    )
    assert isinstance(answer.output_parsed, Place)


@pytest.mark.parametrize("use_responses_api", [False, True], ids=["chat", "responses"])
class TestLangChainOpenAI:
    def _model(self, url: str, max_tokens: int, **options: Any) -> Any:
        from langchain_openai import ChatOpenAI

        return ChatOpenAI(
            base_url=url, api_key=KEY, model="tiny", max_tokens=max_tokens, max_retries=0, **options
        )

    def test_invoke(self, url: str, use_responses_api: bool) -> None:
        assert self._model(url, 8, use_responses_api=use_responses_api).invoke("fox").content

    def test_stream(self, url: str, use_responses_api: bool) -> None:
        model = self._model(url, 8, use_responses_api=use_responses_api)
        assert [chunk for chunk in model.stream("fox") if chunk.content]

    def test_structured(self, url: str, use_responses_api: bool) -> None:
        model = self._model(url, 200, use_responses_api=use_responses_api)
        answer = model.with_structured_output(Place, method="json_schema").invoke("fox")
        assert isinstance(answer, Place)

    def test_tools(self, url: str, use_responses_api: bool) -> None:
        model = self._model(url, 400, use_responses_api=use_responses_api)
        answer = model.bind_tools([Place], tool_choice="Place").invoke("fox")
        assert answer.tool_calls[0]["name"] == "Place"


def test_langchain_anthropic(root_url: str) -> None:
    from langchain_anthropic import ChatAnthropic

    model: Any = ChatAnthropic(
        base_url=root_url, api_key=KEY, model="tiny", max_tokens=8, max_retries=0
    )
    assert model.invoke("fox").content
    assert [chunk for chunk in model.stream("fox") if chunk.content]


def test_litellm_openai(url: str) -> None:
    import litellm

    options: Any = {"model": "openai/tiny", "api_base": url, "api_key": KEY, "max_tokens": 8}
    answer: Any = litellm.completion(messages=USER, **options)
    assert answer.choices[0].message.content
    chunks: Any = litellm.completion(messages=USER, stream=True, **options)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def test_litellm_anthropic(root_url: str) -> None:
    import litellm

    answer: Any = litellm.completion(
        model="anthropic/tiny", api_base=root_url, api_key=KEY, messages=USER, max_tokens=8
    )
    assert answer.choices[0].message.content


def test_litellm_responses(url: str) -> None:
    import litellm

    answer: Any = litellm.responses(
        model="openai/tiny", input="fox", api_base=url, api_key=KEY, max_output_tokens=8
    )
    assert answer.output


@pytest.mark.parametrize("kind", ["chat", "responses", "anthropic"])
def test_pydantic_ai(url: str, root_url: str, kind: str) -> None:
    from pydantic_ai import Agent
    from pydantic_ai.models.anthropic import AnthropicModel
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.anthropic import AnthropicProvider
    from pydantic_ai.providers.openai import OpenAIProvider

    if kind == "anthropic":
        provider = AnthropicProvider(api_key=KEY, base_url=root_url)
        model: Any = AnthropicModel("tiny", provider=provider)
    else:
        make = OpenAIChatModel if kind == "chat" else OpenAIResponsesModel
        model = make("tiny", provider=OpenAIProvider(base_url=url, api_key=KEY))
    text = Agent(model, model_settings={"max_tokens": 8}).run_sync("fox")
    assert text.output
    agent: Any = Agent(
        model,
        output_type=Place,
        model_settings={"max_tokens": 400, "parallel_tool_calls": False},
    )
    assert isinstance(agent.run_sync("fox").output, Place)


@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA"])
def test_instructor(openai_client: Any, mode: str) -> None:
    import instructor

    client: Any = instructor.from_openai(openai_client, mode=getattr(instructor.Mode, mode))
    place = client.chat.completions.create(
        model="tiny", messages=USER, response_model=Place, max_tokens=400, max_retries=0
    )
    assert isinstance(place, Place)


def test_llm_command(url: str, folder: Path) -> None:
    (folder / "extra-openai-models.yaml").write_text(
        f"- model_id: tiny\n  model_name: tiny\n  api_base: {url}\n  api_key_name: tiny\n"
    )
    llm = Path(sys.executable).with_name("llm")
    environment = {**os.environ, "LLM_USER_PATH": str(folder)}
    for options in ([], ["--no-stream"]):
        command = [str(llm), "-m", "tiny", "--key", KEY, "-o", "max_tokens", "8", *options, "fox"]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()


@pytest.fixture(scope="session")
def anthropic_client(root_url: str) -> Any:
    import anthropic

    return anthropic.Anthropic(base_url=root_url, api_key=KEY, max_retries=0, timeout=TIMEOUT_S)


def test_anthropic_message(anthropic_client: Any) -> None:
    body: Any = {"model": "tiny", "messages": USER}
    answer = anthropic_client.messages.create(**body, max_tokens=8, system="Be brief.")
    assert answer.content[0].text
    assert (answer.stop_reason, answer.usage.output_tokens) == ("max_tokens", 8)
    counted = anthropic_client.messages.count_tokens(**body, system="Be brief.")
    usage = answer.usage
    n_cached = usage.cache_read_input_tokens + usage.cache_creation_input_tokens
    assert counted.input_tokens == usage.input_tokens + n_cached


def test_anthropic_stream(anthropic_client: Any) -> None:
    with anthropic_client.messages.stream(model="tiny", messages=USER, max_tokens=8) as stream:
        text = "".join(stream.text_stream)
        assert text == stream.get_final_message().content[0].text


def test_anthropic_tools(anthropic_client: Any) -> None:
    answer = anthropic_client.messages.create(
        model="tiny",
        messages=USER,
        max_tokens=400,
        tools=[{"name": "weather", "input_schema": CITY}],
        tool_choice={"type": "tool", "name": "weather"},
    )
    [block] = answer.content
    Place.model_validate(block.input)
    assert answer.stop_reason == "tool_use"


LM_EVAL_PROBE = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
results = []
for context, continuation in json.loads(sys.argv[2]):
    n = len(tokenizer(context).input_ids)
    ids = torch.tensor([tokenizer(context + continuation).input_ids])
    with torch.no_grad():
        scores = model(ids).logits[0, :-1].float().log_softmax(-1)
    own = scores.gather(-1, ids[0, 1:, None]).squeeze(-1)[n - 1 :]
    results.append(float(own.sum()))
print(json.dumps(results))
"""


@pytest.fixture(scope="session")
def lm_eval_model(url: str, folder: Path) -> Any:
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    os.environ["OPENAI_API_KEY"] = KEY
    return LocalCompletionsAPI(
        base_url=f"{url}/completions",
        model="tiny",
        tokenizer=str(folder / "model"),
        tokenizer_backend="huggingface",
        num_concurrent=1,
        max_length=256,
        batch_size=4,
    )


def test_lm_eval_loglikelihood_is_the_in_process_model_s(lm_eval_model: Any, folder: Path) -> None:
    from lm_eval.api.instance import Instance

    pairs = [("the quick brown", " fox"), ("a lazy", " dog jumps"), ("over the", " fox the")]
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=index)
        for index, pair in enumerate(pairs)
    ]
    found = [logprob for logprob, _ in lm_eval_model.loglikelihood(requests)]
    python = os.environ["FAASMOE_PYTHON"]
    command = [python, "-c", LM_EVAL_PROBE, str(folder / "model"), json.dumps(pairs)]
    expected = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert found == pytest.approx(expected, abs=1e-4)


def _lm_eval(
    folder: Path, model: str, model_args: str, output: str
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Run the task `words` with lm-eval's command.

    Returns:
        The task's accuracies by name, and the log-likelihoods of each document's choices.
    """
    command = [sys.executable, "-m", "lm_eval", "run", "--tasks", "words"]
    command += ["--include_path", str(HERE / "lm_eval"), "--log_samples"]
    command += ["--model", model, "--model_args", model_args, "--output_path", output]
    environment = {**os.environ, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command,
        cwd=folder,
        env={**environment, "OPENAI_API_KEY": KEY},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    [samples] = (folder / output).rglob("samples_words_*.jsonl")
    documents = [json.loads(line) for line in samples.read_text().splitlines()]
    [results] = (folder / output).rglob("results_*.json")
    found = json.loads(results.read_text())["results"]["words"]
    accuracies = {name: found[name] for name in ("acc,none", "acc_norm,none")}
    return accuracies, {
        d["doc"]["question"]: [float(response[0][0]) for response in d["resps"]] for d in documents
    }


def test_lm_eval_task_gives_the_in_process_model_s_numbers(url: str, folder: Path) -> None:
    words = ["fox", "dog", "quick", "lazy dog", "over the fox"]
    documents = [
        {"question": f"the {word}", "choices": [f" {choice}" for choice in words], "answer": index}
        for index, word in enumerate(words)
    ]
    (folder / "words.jsonl").write_text("\n".join(map(json.dumps, documents)))
    model = folder / "model"
    served = f"model=tiny,base_url={url}/completions,tokenizer={model},max_length=256"
    of_api, through_api = _lm_eval(folder, "local-completions", f"{served},num_concurrent=1", "api")
    # The tiny tokenizer has no EOS token, from which lm-eval takes the prefix of empty contexts.
    of_hf, in_process = _lm_eval(
        folder, "hf", f"pretrained={model},dtype=float32,prefix_token_id=0", "hf"
    )
    assert of_api == of_hf
    assert through_api.keys() == in_process.keys() == {d["question"] for d in documents}
    for question, expected in in_process.items():
        assert through_api[question] == pytest.approx(expected, abs=1e-4)


def test_lm_eval_generate(lm_eval_model: Any) -> None:
    from lm_eval.api.instance import Instance

    arguments = ("the quick", {"until": ["\n"], "max_gen_toks": 8, "temperature": 0})
    request = Instance(request_type="generate_until", doc={}, arguments=arguments, idx=0)
    [text] = lm_eval_model.generate_until([request])
    assert text


def _javascript_checks() -> list[str]:
    names = ["openai-js chat", "openai-js chat stream"]
    names += ["openai-js responses", "openai-js responses stream"]
    models = ["openai (responses)", "openai (chat)", "openai-compatible", "anthropic"]
    uses = ["generateText", "streamText", "generateObject", "tools"]
    return names + [f"ai-sdk {model} {use}" for model in models for use in uses]


@pytest.fixture(scope="session")
def javascript(url: str) -> dict[str, Any]:
    environment = {**os.environ, "BASE_URL": url, "API_KEY": KEY}
    command = ["node", str(HERE / "js" / "clients.mjs")]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines, done.stderr
    return {line["name"]: line for line in lines}


@pytest.mark.parametrize("name", _javascript_checks())
def test_javascript(javascript: dict[str, Any], name: str) -> None:
    assert javascript[name]["ok"], javascript[name]["error"]
