"""What rounding the inputs of every matrix changes in SmolLM2's output: `python -m benchmarks.input_bits`.

Inputs are rounded to fixed point in groups of 32, as `layerwise/nets/native.c` does for packed matrices (16 bits), with
other widths as controls, and beside computing all of the model in bfloat16. KL(float32 || rounded) in nats per token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import layerwise as lw
from benchmarks.common import machine
from layerwise.stack.decoder import DecoderStack

BLOCKS, LENGTH, GROUP = 2, 384, 32
WIDTHS = (6, 8, 10, 16)


def rounded(x: Tensor, bits: int) -> Tensor:
    """x to the nearest of 2^bits - 1 steps between plus and minus the largest of its group."""
    groups = x.unflatten(-1, (-1, GROUP))
    step = (groups.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)).clamp_min(1e-30)
    return ((groups / step).round() * step).flatten(-2)


@torch.inference_mode()
def main() -> None:
    from layerwise.data import text_blocks

    half = lw.open("smollm2")
    assert isinstance(half, DecoderStack) and half.tokenizer is not None
    rows = text_blocks("default", half.tokenizer, length=LENGTH, blocks=BLOCKS).tokens_NT.split(1)
    wide = half.copied(torch.float32)

    def read(stack: DecoderStack) -> list[Tensor]:
        return [stack(row).float().log_softmax(-1) for row in rows]

    own = read(wide)

    def say(what: str, other: list[Tensor]) -> None:
        kl = sum(float((p.exp() * (p - q)).sum(-1).mean()) for p, q in zip(own, other, strict=True)) / len(rows)
        same = sum(float((p.argmax(-1) == q.argmax(-1)).float().mean()) for p, q in zip(own, other, strict=True))
        print(f"| {what} | {kl:.5f} | {same / len(rows):.1%} |", flush=True)

    print(f"Machine: {machine()}; {BLOCKS} x {LENGTH} tokens.\n")
    print("| inputs | KL, nats | same likeliest token |\n|---|---|---|")
    say("all of the model in bfloat16", read(half))
    for bits in WIDTHS:
        hooks = [module.register_forward_pre_hook(_rounding(bits)) for module in _readers(wide)]
        hooks.append(wide.decoder.norm.register_forward_hook(_rounding_output(bits)))  # what the head reads
        say(f"{bits} bits in groups of {GROUP}", read(wide))
        for hook in hooks:
            hook.remove()


def _readers(stack: DecoderStack) -> list[nn.Module]:
    """Every linear layer inside the blocks."""
    return [module for layer in range(len(stack)) for module in stack.block(layer).modules()
            if isinstance(module, nn.Linear)]


def _rounding(bits: int) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]]:
    return lambda module, given: (rounded(given[0], bits),)


def _rounding_output(bits: int) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]:
    return lambda module, given, made: rounded(made, bits)


if __name__ == "__main__":
    main()
