"""What no honest client sends: every answer is below 500, and the server goes on."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest

from tests.serve.served import Served
from tests.serve.test_http import call

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}]}
BODIES: list[bytes] = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"text"',
    b"\xff\xfe\x00",
    b"{" * 5000,
    b'{"prompt":' * 2000,
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "a", "temperature": NaN}',
    b'{"prompt": "a", "temperature": Infinity}',
    b'{"prompt": "a", "top_p": -0.1}',
    b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}",
    b'{"prompt": "a", "seed": 1e400}',
    b'{"\\ud800": 1, "prompt": ""}',
    b'{"prompt": "a", "stop": ["\\udfff"]}',
    *(
        json.dumps(body).encode()
        for body in [
            {"prompt": None},
            {"prompt": ""},
            {"prompt": []},
            {"prompt": [""]},
            {"prompt": [[]]},
            {"prompt": [-1]},
            {"prompt": [10**9]},
            {"prompt": [257]},
            {"prompt": [True]},
            {"prompt": [1.5]},
            {"prompt": ["a", 1]},
            {"prompt": {"a": 1}},
            {"prompt": ["a"] * 300},
            {"prompt": "a" * 100_000},
            {"prompt": list(range(200)) * 100},
            {"prompt": "a", "max_tokens": -1},
            {"prompt": "a", "max_tokens": 0},
            {"prompt": "a", "max_tokens": 1.5},
            {"prompt": "a" * 250, "max_tokens": 2**70},
            {"prompt": "a", "n": 0},
            {"prompt": "a", "n": 10**6},
            {"prompt": ["a"] * 200, "n": 64},
            {"prompt": "a", "temperature": 1e-300, "max_tokens": 2},
            {"prompt": "a", "top_p": 0, "max_tokens": 2},
            {"prompt": "a", "top_k": -1, "max_tokens": 2},
            {"prompt": "a", "top_k": -2},
            {"prompt": "a", "min_p": 2},
            {"prompt": "a", "seed": 2**63},
            {"prompt": "a", "seed": -(2**63), "max_tokens": 2},
            {"prompt": "a", "logprobs": 21},
            {"prompt": "a", "logprobs": -1},
            {"prompt": "a", "logit_bias": {"x": 1}},
            {"prompt": "a", "logit_bias": {"-1": 1}},
            {"prompt": "a", "logit_bias": {"99999": 1}},
            {"prompt": "a", "logit_bias": {"1": 1e9}},
            {"prompt": "a", "logit_bias": {str(token): -100 for token in range(257)}, "max_tokens": 3},
            {"prompt": "a", "repetition_penalty": 0},
            {"prompt": "a", "repetition_penalty": 100, "max_tokens": 3},
            {"prompt": "a", "stop": ""},
            {"prompt": "a", "stop": ["x"] * 99},
            {"prompt": "a", "stop": 5},
            {"prompt": "a", "stream": "yes"},
            {"prompt": "a", "stream_options": {"x": 1}},
            {"prompt": "a", "best_of": 3},
            {"prompt": "a", "suffix": "b"},
            {"prompt": "a", "model": "x" * 10_000},
            {"prompt": "a", "model": 5},
            {"prompt": "a", "priority": -1},
            {"prompt": "a", "echo": True, "max_tokens": 0},
            {"prompt": "a", "response_format": {"type": "json_schema"}},
            {"prompt": "a", "response_format": {"type": "xml"}},
        ]
    ),
]
CHATS: list[Any] = [
    {},
    {"messages": []},
    {"messages": "hello"},
    {"messages": [{}]},
    {"messages": [{"role": "king", "content": "a"}]},
    {"messages": [{"role": "user", "content": 5}]},
    {"messages": [{"role": "user", "content": None}], "max_tokens": 2},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
    {"messages": [{"role": "user", "content": "a"}] * 5000},
    {"messages": [{"role": "tool", "content": "a"}], "max_tokens": 2},
    CHAT | {"max_tokens": 0},
    CHAT | {"max_completion_tokens": -5},
    CHAT | {"tools": [{}]},
    CHAT | {"top_logprobs": 5, "max_tokens": 2},
    CHAT | {"logprobs": 5},
    CHAT | {"functions": [{}]},
    CHAT | {"modalities": ["audio"]},
    CHAT | {"n": "2"},
]


@pytest.mark.parametrize("stream", [False, True])
def test_bad_bodies_get_an_error_below_500(served: Served, stream: bool) -> None:
    given = [("completions", body) for body in BODIES]
    given += [("chat/completions", body) for body in [b"{}", b"[]", *(json.dumps(chat).encode() for chat in CHATS)]]
    for path, body in given:
        if stream and body.endswith(b"}"):
            body = body[:-1] + b', "stream": true}'
        status, found, _ = call(f"{served.url}/v1/{path}", body)
        assert status < 500, (path, body[:200], found)
        assert status == 200 or found["error"]["message"], body[:200]
    served.calm()


@pytest.mark.parametrize("query", [
    "", "prompt=&max_tokens=2", "prompt=a&max_tokens=-1", "prompt=a&temperature=nan", "prompt=a&temperature=inf",
    "prompt=a&seed=99999999999999999999", "prompt=%ff%fe&max_tokens=2", "prompt=a&raw=perhaps", "prompt=" + "a" * 5000,
])  # fmt: skip
def test_bad_queries_too(served: Served, query: str) -> None:
    assert call(f"{served.url}/v1/stream?{query}")[0] < 500


@pytest.mark.parametrize("text", [
    b"\x00" * 100, b"GET / HTTP/9.9\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: abc\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{",
])  # fmt: skip
def test_what_is_not_http_harms_nobody(served: Served, text: bytes) -> None:
    with socket.create_connection(("127.0.0.1", served.port), 10) as wire:
        try:
            wire.sendall(text)
            wire.shutdown(socket.SHUT_WR)
            answer = wire.recv(100)
        except OSError:
            answer = b""
        assert b" 50" not in answer[:20]
    assert call(f"{served.url}/health")[0] == 200


def test_a_page_of_another_site_cannot_make_the_model_work(served: Served) -> None:
    assert call(f"{served.url}/v1/stream?prompt=a", Sec_Fetch_Site="cross-site")[0] == 403
    assert call(f"{served.url}/v1/completions", b'{"prompt": "a"}', Content_Type="text/plain")[0] in (400, 415)


def test_a_body_that_never_ends_is_given_up(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    from layerwise.serve.guard import Guard

    seen = []
    original = Guard.__call__

    async def hurried(self: Guard, scope: Any, receive: Any, send: Any) -> None:
        self.patience = 0.3
        seen.append(scope["path"])
        await original(self, scope, receive, send)

    monkeypatch.setattr(Guard, "__call__", hurried)
    with socket.create_connection(("127.0.0.1", served.port), 10) as wire:
        wire.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n{"
        )
        assert b"408" in wire.recv(1000)[:20] and seen
