"""A tiny model with a tokenizer, and a server for it in a thread."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from layerwise.serve.background import AsyncEngine
from layerwise.serve.engine import Engine
from layerwise.serve.run import bind, server
from layerwise.serve.service import Bounds, Service
from layerwise.stack.decoder import DecoderStack
from layerwise.stack.open import open
from layerwise.testing.stacks import random_stack

TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def tiny(folder: Path, template: str | None = TEMPLATE) -> Path:
    """Four random layers over bytes; token 256 ends a text; prompts and answers have 256 tokens at most."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)} | {"<end>": len(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    folder = random_stack(4, hidden=32, vocabulary=len(vocabulary)).save(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<end>"} | ({"chat_template": template} if template else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@dataclass
class Served:
    """A running server, and what it serves."""

    service: Service
    url: str

    @property
    def engine(self) -> Engine:
        return self.service.engine.engine

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def client(self, **given: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, "timeout": 30} | given)

    def calm(self) -> None:
        """Assert that nothing runs, and that every block is free or holds a prefix."""
        for _ in range(500):
            if not self.engine.busy:
                break
            threading.Event().wait(0.01)
        assert not self.engine.busy
        self.engine.check_integrity()


@contextmanager
def serving(stack: DecoderStack, *, key: str | None = None, bounds: Bounds | None = None,
            grace: float = 5.0, **options: Any) -> Iterator[Served]:
    """A server in a thread; `options` are the engine's."""
    service = Service(AsyncEngine(Engine(stack, **{"cache_tokens": 8192} | options)), "tiny", bounds)
    bound, ready = bind("127.0.0.1", 0), threading.Event()
    made = server(service, key=key, grace=grace, ready=ready.set)
    thread = threading.Thread(target=made.run, args=([bound],))
    thread.start()
    try:
        assert ready.wait(30)
        yield Served(service, f"http://127.0.0.1:{bound.getsockname()[1]}")
    finally:
        made.should_exit = True
        thread.join(30)
        bound.close()
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="session")
def talker(tiny_folder: Path) -> DecoderStack:
    """The tiny model, opened."""
    stack = open(tiny_folder)
    assert isinstance(stack, DecoderStack)
    return stack


@pytest.fixture(scope="module")
def served(talker: DecoderStack) -> Iterator[Served]:
    """One server for a file of tests; it must be calm when they are through."""
    with serving(talker) as found:
        yield found
        found.calm()
