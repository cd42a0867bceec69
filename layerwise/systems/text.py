"""Texts that several systems read: plain prose, and sums of graded difficulty."""

from __future__ import annotations

import random
from dataclasses import replace

import torch

from layerwise.data.text import TextData, Tokenizer, encoder, frame, text_blocks
from layerwise.measure.answers import Answered


def prose(tokenizer: Tokenizer, blocks: int, length: int, seed: int) -> TextData:
    """English from the calibration half of the default text."""
    return text_blocks("default", tokenizer, length=length, blocks=blocks, seed=seed)


def sums(tokenizer: Tokenizer, digits: int, prompts: int, seed: int, *, length: int = 96) -> TextData:
    """Prompts of worked additions of numbers with `digits` digits, all cut to `length` tokens.

    Equal lengths, so that what differs between levels is the difficulty and not the length.
    """
    draw = random.Random(seed * 100 + digits)
    texts = ["\n".join(_sum(draw, digits) for _ in range(length)) for _ in range(prompts)]
    data = TextData.from_prompts(texts, tokenizer, name=f"sums of {digits} digits")
    return replace(data, tokens_NT=data.tokens_NT[:, :length], mask_NT=None)


def asked_sums(tokenizer: Tokenizer, digits: int, prompts: int, seed: int, *, shown: int = 2) -> list[Answered]:
    """Additions after `shown` worked ones, with their answer: the text, and which of its tokens are the answer."""
    draw, encode = random.Random(seed * 100 + digits), encoder(tokenizer)
    _, after = frame(encode)
    found = []
    for _ in range(prompts):
        text = "\n".join(_sum(draw, digits) for _ in range(shown + 1))
        asked = text[: text.rindex("=") + 1]
        ids, question = (encode(part)[: len(encode(part)) - len(after)] for part in (text, asked))
        found.append(Answered(torch.tensor(ids), tuple(range(len(question), len(ids)))))
    return found


def _sum(draw: random.Random, digits: int) -> str:
    a, b = (draw.randint(10 ** (digits - 1), 10**digits - 1) for _ in range(2))
    return f"{a} + {b} = {a + b}"
