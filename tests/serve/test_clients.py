"""Many clients at once, good and bad: who asks properly is answered properly, and nothing is left behind."""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

import psutil

from layerwise.serve.engine import Engine
from layerwise.serve.request import Params
from layerwise.stack.decoder import DecoderStack
from tests.serve.served import Served, serving

CLIENTS, TOKENS = 200, 12
GARBAGE = [
    b'{"prompt": ', b'{"prompt": "%s"}' % (b"a" * 5000), b'{"prompt": 5}', b'{"prompt": "a", "max_tokens": -3}',
    b"\xff\xfe", b'{"prompt": "a", "temperature": NaN}', b"[]", b'{"prompt": [[999999]]}',
    b'{"prompt": "a", "stop": {"a": 1}}', b'{"prompt": "a", "model": "nobody"}',
]  # fmt: skip


def body(prompt: str, tokens: int = TOKENS, **given: Any) -> bytes:
    return json.dumps({"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True, "ignore_eos": True,
                       **given}).encode()


async def post(served: Served, content: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nConnection: close\r\n" \
           f"Content-Length: {len(content)}\r\n\r\n"
    writer.write(head.encode() + content)
    await writer.drain()
    return reader, writer


async def good(served: Served, prompt: str) -> str:
    """The whole text of a stream."""
    reader, writer = await post(served, body(prompt))
    text = (await reader.read()).decode()
    writer.close()
    lines = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]", text[:300]
    return "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1])


async def vanishing(served: Served, prompt: str, after: int) -> None:
    """Leaves in the middle of a stream, without a goodbye."""
    reader, writer = await post(served, body(prompt, 900))  # long enough to be noticed before it ends
    await reader.read(after)
    writer.transport.abort()


async def garbage(served: Served, content: bytes) -> int:
    """The status that nonsense gets."""
    reader, writer = await post(served, content)
    status = int((await reader.readline()).split()[1])
    writer.close()
    return status


async def everybody(served: Served, prompts: list[str]) -> list[Any]:
    """200 clients at once: a fifth vanish, a tenth send garbage; what each got, None for those that left."""
    def one(number: int) -> Coroutine[Any, Any, Any]:
        prompt = prompts[number % len(prompts)]
        if number % 10 == 0:
            return garbage(served, GARBAGE[number // 10 % len(GARBAGE)])
        return vanishing(served, prompt, 50 * (number % 40)) if number % 5 == 1 else good(served, prompt)

    return await asyncio.wait_for(asyncio.gather(*map(one, range(CLIENTS))), 120)


def test_200_clients_of_whom_some_misbehave(talker: DecoderStack) -> None:
    letters = random.Random(0)
    prompts = ["".join(letters.choices("abcdefgh", k=letters.randint(1, 40))) for _ in range(23)]
    expected = [found.text for found in Engine(talker, cache_tokens=2048).generate(
        prompts, Params(max_tokens=TOKENS, stop_ids=()))]
    blocks = [talker.block(layer) for layer in range(len(talker))]
    lasting = talker.rebuilt(replace(talker.spec, context=1024), blocks)
    with serving(lasting, prefix_cache=False, cache_tokens=4096) as served:
        asyncio.run(good(served, "warm"))
        before = psutil.Process(os.getpid()).memory_info().rss
        found = asyncio.run(everybody(served, prompts))
        served.calm()
        for number, got in enumerate(found):
            if number % 10 == 0:
                assert got in (400, 404), number
            elif number % 5 != 1:
                assert got == expected[number % len(prompts)], number
        metrics = served.engine.metrics()
        assert metrics["cache_used_ratio"] == metrics["requests_running"] == metrics["requests_waiting"] == 0
        assert metrics["requests_cancelled_total"] == CLIENTS // 5
        assert asyncio.run(good(served, prompts[0])) == expected[0]
        assert psutil.Process(os.getpid()).memory_info().rss - before < 64 << 20


def test_more_than_the_queue_holds_is_told_to_come_again(talker: DecoderStack) -> None:
    [expected] = Engine(talker, cache_tokens=512).generate(["abc"], Params(max_tokens=TOKENS, stop_ids=()))

    async def one(served: Served) -> tuple[int, bool, str]:
        reader, writer = await post(served, body("abc", stream=False))
        head, _, text = (await reader.read()).decode().partition("\r\n\r\n")
        writer.close()
        return int(head.split()[1]), "retry-after:" in head.lower(), text

    async def crowd(served: Served) -> list[tuple[int, bool, str]]:
        return await asyncio.wait_for(asyncio.gather(*(one(served) for _ in range(CLIENTS))), 120)

    with serving(talker, running=2, waiting=4) as served:
        found = asyncio.run(crowd(served))
        assert {status for status, _, _ in found} == {200, 429}
        for status, hint, text in found:
            assert hint == (status == 429)
            assert status == 429 or json.loads(text)["choices"][0]["text"] == expected.text
        assert asyncio.run(good(served, "abc")) == expected.text
        served.calm()


def test_a_cancelled_stream_leaves_the_others_alone(talker: DecoderStack) -> None:
    with serving(talker, running=4) as served:
        client = served.client()
        [whole] = client.completions.create(model="tiny", prompt="abc", max_tokens=40, temperature=0).choices
        streams = [client.completions.create(model="tiny", prompt=text, max_tokens=200, stream=True, n=2,
                                             extra_body={"ignore_eos": True}) for text in ("abd", "xyz", "abc")]
        for stream in streams:
            next(iter(stream))
            stream.close()
        [again] = client.completions.create(model="tiny", prompt="abc", max_tokens=40, temperature=0).choices
        assert again.text == whole.text
        served.calm()
        assert served.engine.metrics()["requests_cancelled_total"] >= 1
