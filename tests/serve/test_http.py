"""The interface as OpenAI's own client sees it, beside what the engine says by itself."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

import openai
import pytest

from layerwise.serve.engine import Engine
from layerwise.serve.request import Params
from layerwise.serve.service import Bounds
from layerwise.stack.decoder import DecoderStack
from tests.serve.served import Served, serving

SAID = [{"role": "user", "content": "Hello"}]
PROMPT = "[user]Hello\n[assistant]"


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return served.client()


def plain(stack: DecoderStack, prompt: str = PROMPT, **given: Any) -> str:
    """What the engine answers by itself."""
    [found] = Engine(stack, cache_tokens=1024).generate([prompt], Params(**given))
    return found.text


def call(url: str, body: bytes | None = None, **headers: str) -> tuple[int, dict[str, Any], Any]:
    """Status, JSON and headers of a plain HTTP request."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"} | names)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            text, status, found = answer.read(), answer.status, answer.headers
    except urllib.error.HTTPError as error:
        text, status, found = error.read(), error.code, error.headers
    return status, json.loads(text) if "json" in found["content-type"] else {"text": text.decode()}, found


def test_models(client: openai.OpenAI, served: Served) -> None:
    [model] = client.models.list().data
    assert model.id == "tiny" == client.models.retrieve("tiny").id
    assert model.model_dump()["max_model_len"] == served.engine.longest
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        client.models.retrieve("gpt-4")


def test_a_completion_is_what_the_engine_writes(client: openai.OpenAI, talker: DecoderStack) -> None:
    found = client.completions.create(model="tiny", prompt="abc", max_tokens=12, temperature=0)
    assert found.choices[0].text == plain(talker, "abc", max_tokens=12)
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (3, 12, 15)
    assert found.choices[0].finish_reason == "length"
    ids = client.completions.create(model="tiny", prompt=talker.tokenizer.encode("abc"), max_tokens=12, temperature=0)
    assert ids.choices[0].text == found.choices[0].text


def test_several_prompts_and_answers_keep_their_order(client: openai.OpenAI, talker: DecoderStack) -> None:
    found = client.completions.create(model="tiny", prompt=["abc", "xyz"], max_tokens=8, temperature=0, n=2)
    texts = [choice.text for choice in sorted(found.choices, key=lambda choice: choice.index)]
    assert texts == [plain(talker, prompt, max_tokens=8) for prompt in ("abc", "abc", "xyz", "xyz")]
    assert found.usage is not None and found.usage.prompt_tokens == 6 and found.usage.completion_tokens == 32


def test_a_chat_goes_through_the_template(client: openai.OpenAI, talker: DecoderStack) -> None:
    found = client.chat.completions.create(model="tiny", messages=SAID, max_tokens=12, temperature=0)
    assert found.choices[0].message.content == plain(talker, max_tokens=12)
    assert found.choices[0].message.role == "assistant"
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}]
    again = client.chat.completions.create(model="tiny", messages=parts, max_completion_tokens=12, temperature=0)
    assert again.choices[0].message.content == found.choices[0].message.content


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stream_adds_up_to_the_whole(client: openai.OpenAI, temperature: float) -> None:
    given: dict[str, Any] = {"model": "tiny", "messages": SAID, "max_tokens": 40, "temperature": temperature,
                             "seed": 7, "n": 2, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**given)
    chunks = list(client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens and chunks[-1].choices == []
    for choice in whole.choices:
        own = [piece for chunk in chunks for piece in chunk.choices if piece.index == choice.index]
        assert "".join(piece.delta.content or "" for piece in own) == choice.message.content
        assert own[0].delta.role == "assistant" and own[-1].finish_reason == choice.finish_reason
        tokens = [entry.token for piece in own if piece.logprobs for entry in piece.logprobs.content or []]
        assert choice.logprobs is not None and tokens == [entry.token for entry in choice.logprobs.content or []]


def test_a_stream_of_text_adds_up_too(client: openai.OpenAI) -> None:
    given: dict[str, Any] = {"model": "tiny", "prompt": "abc", "max_tokens": 20, "temperature": 0, "logprobs": 1,
                             "echo": True}
    whole = client.completions.create(**given).choices[0]
    pieces = [chunk.choices[0] for chunk in client.completions.create(**given, stream=True)]
    assert "".join(piece.text for piece in pieces) == whole.text and whole.text.startswith("abc")
    assert whole.logprobs is not None
    for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
        parts = [part for piece in pieces if piece.logprobs for part in getattr(piece.logprobs, name)]
        assert parts == getattr(whole.logprobs, name)


def test_seeds_decide_what_is_drawn(client: openai.OpenAI) -> None:
    def draw(seed: int | None) -> list[str]:
        given = client.completions.create(model="tiny", prompt="abc", max_tokens=16, seed=seed, n=2, temperature=1,
                                          extra_body={"top_k": 50, "min_p": 0.01}, top_p=0.95)
        return [choice.text for choice in given.choices]

    first = draw(1)
    assert first == draw(1) != draw(2)
    assert first[0] != first[1]


def test_stops_and_penalties_and_biases(client: openai.OpenAI, talker: DecoderStack) -> None:
    text = plain(talker, "abc", max_tokens=40)
    stop = text[5:7]
    found = client.completions.create(model="tiny", prompt="abc", max_tokens=40, temperature=0, stop=[stop]).choices[0]
    assert found.text == text[: text.index(stop)] and found.finish_reason == "stop"
    q = talker.tokenizer.encode("q")[0]
    biased = client.completions.create(model="tiny", prompt="abc", max_tokens=5, temperature=0,
                                       logit_bias={str(q): 100}).choices[0]
    assert biased.text == "qqqqq"
    given: dict[str, Any] = {"frequency_penalty": 1.5, "presence_penalty": 2, "max_tokens": 9}
    varied = client.completions.create(model="tiny", prompt="abc", temperature=0, logit_bias={str(q): 7}, **given)
    assert varied.choices[0].text == plain(talker, "abc", logit_bias={q: 7}, **given) != "q" * 9
    ended = client.completions.create(model="tiny", prompt="abc", max_tokens=5, temperature=0,
                                      logit_bias={"256": 100}).choices[0]
    assert (ended.text, ended.finish_reason) == ("", "stop")


def test_an_echo_scores_the_prompt(client: openai.OpenAI, talker: DecoderStack) -> None:
    found = client.completions.create(model="tiny", prompt="abc", max_tokens=0, logprobs=0, echo=True).choices[0]
    ids = talker.tokenizer.encode("abc")
    [scored] = Engine(talker, cache_tokens=256).generate(
        [ids], Params(max_tokens=0, prompt_logprobs=True, logprobs=0))
    assert found.logprobs is not None and found.text == "abc"
    assert found.logprobs.token_logprobs == [None, *(entry.logprob for entry in scored.prompt_logprobs)]
    again: dict[str, Any] = {"model": "tiny", "prompt": "abc" * 30, "max_tokens": 1, "temperature": 0}
    long = [client.completions.create(**again, logprobs=0, echo=True).choices[0] for _ in range(2)]
    assert long[0].logprobs is not None and len(long[0].logprobs.tokens) >= 90 and long[0] == long[1]
    assert found.logprobs.tokens == ["a", "b", "c"] and found.logprobs.text_offset == [0, 1, 2]


def test_answers_follow_a_schema(client: openai.OpenAI) -> None:
    pytest.importorskip("xgrammar", reason="needs the extra 'serve'")
    schema = {"type": "object", "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 120},
                                               "kind": {"enum": ["cat", "dog"]}},
              "required": ["age", "kind"], "additionalProperties": False}
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "pet", "schema": schema}}
    found = client.chat.completions.create(model="tiny", messages=SAID, n=2, seed=3, temperature=1, max_tokens=100,
                                           response_format=wanted)
    for choice in found.choices:
        value = json.loads(choice.message.content or "")
        assert set(value) == {"age", "kind"} and 0 <= value["age"] <= 120 and value["kind"] in ("cat", "dog")
        assert choice.finish_reason == "stop"


@pytest.mark.parametrize("schema", [
    {"type": "banana"}, {"$ref": "#"}, {"type": "string", "maxLength": 10**9}, {"enum": ["x" * 20_000]},
    {"type": "string", "pattern": "(((a{1,99}){1,99}){1,99})"}, {"type": "string", "pattern": "((["},
    {"type": "array", "minItems": -5, "maxItems": -7},
    {"type": "object", "properties": {"a": {"$ref": "#/properties/a"}}, "required": ["a"]},
], ids=str)  # fmt: skip
def test_schemas_that_cannot_be_followed_are_the_clients_fault(client: openai.OpenAI, schema: dict[str, Any]) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="tiny", messages=SAID, max_tokens=50, response_format=wanted)


def test_a_model_without_a_template_gets_a_plain_one(talker: DecoderStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(talker.tokenizer), "_template", lambda self: None)
    with serving(talker) as found:
        text = found.client().chat.completions.create(model="tiny", messages=SAID, max_tokens=12, temperature=0)
    assert text.choices[0].message.content == plain(talker, "User: Hello\nAssistant:", max_tokens=12,
                                                    stop=("\nUser:",))


def test_too_long_a_prompt_is_told_both_numbers(client: openai.OpenAI, served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match=r"300.*256") as error:
        client.completions.create(model="tiny", prompt="a" * 300, max_tokens=4)
    assert error.value.code == "context_length_exceeded"


def test_prompts_may_be_limited_further(talker: DecoderStack) -> None:
    with serving(talker, bounds=Bounds(prompt=20)) as found:
        with pytest.raises(openai.BadRequestError, match=r"21.*20"):
            found.client().completions.create(model="tiny", prompt="a" * 21, max_tokens=2)
        assert found.client().completions.create(model="tiny", prompt="a" * 20, max_tokens=2).choices


def test_errors_have_openais_form(served: Served) -> None:
    status, body, _ = call(f"{served.url}/v1/completions", b'{"prompt": "a", "max_tokens": "many"}')
    assert status == 400 and set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["param"] == "max_tokens" and body["error"]["type"] == "invalid_request_error"
    status, body, _ = call(f"{served.url}/v1/completions", b'{"prompt": "a", "max_token": 5}')
    assert status == 400 and body["error"]["param"] == "max_token"
    status, body, _ = call(f"{served.url}/v1/chat/completions",
                           json.dumps({"messages": SAID, "tools": [{"type": "function"}]}).encode())
    assert status == 400 and body["error"]["message"] == "tools: not supported here; leave it out"
    status, body, _ = call(f"{served.url}/v1/embeddings", b"{}")
    assert status == 404 and "no POST /v1/embeddings here" in body["error"]["message"]
    status, body, _ = call(f"{served.url}/v1/completions")
    assert status == 405 and "POST /v1/completions" in body["error"]["message"]


@pytest.mark.parametrize(("given", "said"), [
    ({"max_token": 5}, "max_token: not a field that is known here"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
     "messages.0.content.0.type: Input should be 'text'"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content: Input should be a valid string"),
    ({"stop": 5}, "stop: Input should be a valid string"),
    ({"logit_bias": {"x": 1}}, "logit_bias.x: String should match"),
], ids=str)  # fmt: skip
def test_errors_name_the_place(served: Served, given: dict[str, Any], said: str) -> None:
    status, body, _ = call(f"{served.url}/v1/chat/completions", json.dumps({"messages": SAID} | given).encode())
    assert status == 400 and body["error"]["message"].startswith(said)


def test_a_body_too_large_is_refused(served: Served) -> None:
    status, body, _ = call(f"{served.url}/v1/completions", b" " * (served.service.bounds.body + 1))
    assert status == 413 and str(served.service.bounds.body) in body["error"]["message"]


def test_a_full_queue_says_when_to_come_again(talker: DecoderStack) -> None:
    with serving(talker, running=1, waiting=1) as found:
        statuses, hints = [], []
        streams = [found.client().completions.create(model="tiny", prompt="abc", max_tokens=250, stream=True,
                                                     extra_body={"ignore_eos": True})]
        next(iter(streams[0]))
        body = json.dumps({"prompt": ["a"] * 8, "max_tokens": 2}).encode()
        status, answer, headers = call(f"{found.url}/v1/completions", body)
        statuses.append(status)
        hints.append(headers["Retry-After"])
        streams[0].close()
        assert statuses == [429] and int(hints[0]) >= 1 and answer["error"]["code"] == "queue_full"
        found.calm()


def test_time_is_limited(talker: DecoderStack) -> None:
    with serving(talker, bounds=Bounds(seconds=0.2)) as found:
        given = found.client().completions.create(
            model="tiny", prompt=["abc"] * 16, max_tokens=200, temperature=0, extra_body={"ignore_eos": True})
        assert {choice.finish_reason for choice in given.choices} == {"length"}
        assert given.usage is not None and 0 < given.usage.completion_tokens < 16 * 200
        found.calm()


def test_a_key_is_needed_where_there_is_one(talker: DecoderStack) -> None:
    with serving(talker, key="sesame") as found:
        assert found.client(api_key="sesame").models.list().data
        with pytest.raises(openai.AuthenticationError):
            found.client(api_key="wrong").models.list()
        assert call(f"{found.url}/v1/models")[0] == 401
        assert call(f"{found.url}/metrics")[0] == 401
        assert call(f"{found.url}/health")[:2] == (200, {"status": "ok"})


def test_metrics_count(served: Served, client: openai.OpenAI) -> None:
    def value(name: str) -> float:
        lines = call(f"{served.url}/metrics")[1]["text"].splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith(f"layerwise_{name} ")))

    before = value("generated_tokens_total"), value("first_token_seconds_count")
    client.completions.create(model="tiny", prompt="abc", max_tokens=7, extra_body={"ignore_eos": True})
    assert value("generated_tokens_total") == before[0] + 7
    assert value("first_token_seconds_count") == before[1] + 1
    assert value("requests_running") == 0
