"""Many coroutines stream from one engine; those that leave, fail or come too late do not disturb the others."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from layerwise.errors import BadData, BadOption
from layerwise.serve.background import AsyncEngine
from layerwise.serve.engine import Engine
from layerwise.serve.request import Event, Params, Request
from layerwise.stack.decoder import DecoderStack
from tests.serve.plain import greedy


async def collect(engine: AsyncEngine, request: Request) -> tuple[list[int], Event]:
    tokens: list[int] = []
    async for event in engine.stream(request):
        tokens += event.tokens
    return tokens, event


def run(work: Any) -> Any:
    return asyncio.run(asyncio.wait_for(work, 60))


def test_streams_get_their_tokens_while_others_leave(stack: DecoderStack, mixed: list[list[int]]) -> None:
    async def leave(engine: AsyncEngine, request: Request) -> None:
        stream = engine.stream(request)
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]

    async def work() -> None:
        engine = AsyncEngine(Engine(stack, cache_tokens=512))
        staying = [collect(engine, Request(tuple(prompt), Params(max_tokens=8))) for prompt in mixed]
        leaving = [leave(engine, Request(tuple(prompt), Params(max_tokens=60))) for prompt in mixed[:4]]
        found = (await asyncio.gather(*staying, *leaving))[: len(mixed)]
        for (tokens, event), prompt in zip(found, mixed, strict=True):
            assert tokens == greedy(stack, prompt, 8) and event.finish == "length"
        await engine.close(grace=10)
        engine.engine.check_integrity()
        assert not engine.engine.busy

    run(work())


def test_a_prompt_streams_in_a_context_that_closes(talker: DecoderStack) -> None:
    async def work() -> None:
        async with AsyncEngine(Engine(talker, cache_tokens=512)) as engine:
            params = Params(max_tokens=9)
            text = "".join([event.text async for event in engine.stream("abc", params)])
            tokens = [token async for event in engine.stream([97, 98], params) for token in event.tokens]
        [one, two] = Engine(talker, cache_tokens=512).generate(["abc", [97, 98]], params)
        assert text == one.text and tokens == list(two.tokens)
        with pytest.raises(BadOption, match="closing"):
            await collect(engine, Request((1,)))

    run(work())


def test_refusals_reach_the_caller(stack: DecoderStack) -> None:
    async def work() -> None:
        engine = AsyncEngine(Engine(stack))
        with pytest.raises(BadData, match="empty prompt"):
            await collect(engine, Request(()))
        await engine.close()
        with pytest.raises(BadOption, match="closing"):
            await collect(engine, Request((1,)))

    run(work())


def test_closing_cancels_what_does_not_end_in_time(stack: DecoderStack) -> None:
    async def work() -> None:
        engine = AsyncEngine(Engine(stack))
        task = asyncio.create_task(collect(engine, Request((1,), Params(max_tokens=250))))
        await asyncio.sleep(0.02)
        await engine.close()
        _, event = await task
        assert event.finish == "cancelled" and event.usage is not None

    run(work())


def test_a_step_that_fails_ends_its_requests_only(stack: DecoderStack, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        inner = Engine(stack)
        engine = AsyncEngine(inner)
        whole = inner.runner.run

        def broken(*args: Any) -> Any:
            raise RuntimeError("out of memory")

        monkeypatch.setattr(inner.runner, "run", broken)
        _, event = await collect(engine, Request((1, 2)))
        assert event.finish == "error" and event.error is not None and "out of memory" in event.error
        monkeypatch.setattr(inner.runner, "run", whole)
        tokens, _ = await collect(engine, Request((1, 2), Params(max_tokens=5)))
        assert tokens == greedy(stack, [1, 2], 5)
        await engine.close(grace=5)
        inner.check_integrity()

    run(work())
