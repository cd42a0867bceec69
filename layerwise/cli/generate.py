"""`layerwise generate`: continue a prompt, as text that appears while it is written."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Annotated

import typer

from layerwise.cli.options import Json, Model
from layerwise.cli.screen import Screen


def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="What to continue, or to answer.")],
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", help="At most this many new tokens.")] = 128,
    temperature: Annotated[float, typer.Option("--temperature", "-t", help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option("--top-k", help="Draw among so many tokens.")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", help="Draw among tokens that make up this share.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Draws the tokens.")] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text itself, without the chat template.")] = False,
    as_json: Json = False,
) -> None:
    """Continue or answer a prompt.

    A model trained for conversation answers; with --raw it continues the text itself.
    """
    from layerwise.errors import BadModel
    from layerwise.generate.sample import generate as sample
    from layerwise.generate.text import stream_text
    from layerwise.stack.open import open

    screen = Screen(as_json)
    stack = open(model)
    if stack.tokenizer is None:
        raise BadModel(
            f"{model}, which has no tokenizer",
            expected="a model folder with tokenizer files",
            do="put the tokenizer files that came with the model into its folder",
        )
    chat = not raw and stack.tokenizer.has_chat_template
    given = stack.tokenizer.encode(stack.tokenizer.chat([{"role": "user", "content": prompt}])) if chat else prompt
    began = time.perf_counter()
    ids: list[int] = []
    stream = sample(stack, given, max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    text = ""
    for piece in stream_text(stack.tokenizer, _recorded(stream, ids)):
        text += piece
        if not as_json:
            print(piece, end="", flush=True)
    screen.show()
    seconds = time.perf_counter() - began
    screen.tell(f"{len(ids)} tokens, {len(ids) / seconds:.1f} tokens/s with the prompt")
    screen.finish({"text": text, "tokens": ids, "tokens_per_s": round(len(ids) / seconds, 2)})


def _recorded(stream: Iterator[int], ids: list[int]) -> Iterator[int]:
    for token in stream:
        ids.append(token)
        yield token
