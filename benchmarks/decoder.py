"""Prefill and decode against transformers on the same weights, taking turns in one process."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

import layerwise as lw
from benchmarks.common import Row, bandwidth, interleaved, peak
from layerwise.generate.sample import generate

PROMPT, NEW, CONTEXT = 64, 48, 1024


@torch.inference_mode()
def rows(slim_folder: Path) -> list[Row]:
    """Rows for prefill in bfloat16, and for decoding of the slimmed model, each against transformers.

    Decoding is what the tokens after the first take: the time of one token, prompt included, is subtracted.
    """
    from transformers import AutoModelForCausalLM

    stack, slim = lw.open("smollm2"), lw.open(slim_folder)
    theirs = AutoModelForCausalLM.from_pretrained(stack.folder, dtype=torch.bfloat16).eval()
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(stack.spec.vocabulary, (1, CONTEXT), generator=generator)
    prompt = tokens_BT[0, :PROMPT].tolist()
    prefill = interleaved(
        {
            "ours": lambda: stack(tokens_BT),
            "theirs": lambda: theirs(tokens_BT, use_cache=False),
        },
        repeats=5,
    )
    writers = {
        "slim": lambda count: list(generate(slim, prompt, max_tokens=count, stop=())),
        "dense": lambda count: list(generate(stack, prompt, max_tokens=count, stop=())),
        "theirs": lambda count: theirs.generate(
            tokens_BT[:, :PROMPT], max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
        ),
    }
    decode = interleaved(
        {(name, count): partial(write, count) for name, write in writers.items() for count in (1, NEW + 1)},
        repeats=5,
    )
    flops = 2 * stack.spec.parameters() * CONTEXT
    reads = bandwidth()
    speed = {name: NEW / (decode[name, NEW + 1] - decode[name, 1]) for name in writers}
    return [
        Row(
            f"prefill of {CONTEXT} tokens, bfloat16, all logits",
            f"{CONTEXT / prefill['ours']:.0f} tokens/s; transformers {CONTEXT / prefill['theirs']:.0f}",
            prefill["theirs"] / prefill["ours"],
            1.0,
            "more",
            f"{CONTEXT * peak() / flops:.0f} tokens/s",
        ),
        Row(
            "decode after `optimize --bytes 55%`, one stream",
            f"{speed['slim']:.0f} tokens/s; bfloat16: transformers {speed['theirs']:.0f}, ours {speed['dense']:.0f}",
            speed["slim"] / speed["theirs"],
            2.0,
            "more",
            f"{reads / slim.spec.bytes():.0f} tokens/s",
        ),
    ]
