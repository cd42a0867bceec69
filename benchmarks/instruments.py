"""What measuring costs beside a plain forward pass, and sweeps beside the naive loop that starts over each time.

`python -m benchmarks.instruments`; also rows of `benchmarks.spine`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

import layerwise as lw
from benchmarks.common import Row, interleaved, machine, table
from layerwise.measure import INSTRUMENTS
from layerwise.measure.base import Forward, Intervention
from layerwise.measure.leave_one_out import LeaveOneOut
from layerwise.measure.quantization_sensitivity import QuantizationSensitivity
from layerwise.stack.base import Stack

BLOCKS, LENGTH = 16, 512
HEAD = 32
"""Positions of a row at which both sides of a sweep run the head."""


@torch.inference_mode()
def rows() -> list[Row]:
    """All forward instruments together, leave-one-out over all layers, sensitivity of all layers at one width."""
    from layerwise.data import text_blocks

    stack = lw.open("smollm2")
    assert stack.tokenizer is not None
    data = text_blocks("default", stack.tokenizer, length=LENGTH, blocks=BLOCKS)
    forward = [name for name in INSTRUMENTS if issubclass(INSTRUMENTS[name], Forward) and not INSTRUMENTS[name].slow]
    return [_overhead(stack, data, forward), *_sweeps(stack, data)]


def _overhead(stack: Stack, data: object, names: list[str]) -> Row:
    tokens_NT = data.tokens_NT  # type: ignore[attr-defined]
    seconds = interleaved({
        "plain": lambda: [stack(row_BT) for row_BT in tokens_NT.split(1)],
        "measured": lambda: lw.measure(stack, data, names, batch=1, progress=False),
    })
    return Row(f"all {len(names)} forward instruments, {BLOCKS} x {LENGTH} tokens",
               f"{seconds['measured']:.1f} s; one plain forward {seconds['plain']:.1f} s",
               seconds["measured"] / seconds["plain"], 1.5, "less", "1 (the forward pass itself)")


def _sweeps(stack: Stack, data: object) -> Iterator[Row]:
    one = data.take(1)  # type: ignore[attr-defined]
    limit = f"{(len(stack) + 1) / (2 * len(stack)):.2f} (half of the layer runs)"
    sweeps: dict[str, Intervention] = {
        "leave-one-out over all layers": LeaveOneOut(tokens=HEAD),
        "4-bit sensitivity of all layers, with its floor": QuantizationSensitivity(
            bits=(4,), tokens=HEAD, outside=False),
    }
    for what, instrument in sweeps.items():
        seconds = interleaved({
            "shared": lambda: lw.measure(stack, one, [instrument], progress=False),  # noqa: B023
            "naive": lambda: _naive(stack, one.tokens_NT, instrument),  # noqa: B023
        }, repeats=2)
        yield Row(f"{what}, {LENGTH} tokens", f"{seconds['shared']:.1f} s; naive loop {seconds['naive']:.1f} s",
                  seconds["shared"] / seconds["naive"], 0.6, "less", limit)


def _naive(stack: Stack, tokens_BT: torch.Tensor, instrument: Intervention) -> None:
    """The whole model again for the original and for every trial; the head at `HEAD` positions."""
    _from_the_start(stack, tokens_BT)
    for trial in instrument.trials(stack):
        assert isinstance(trial.place, int)
        with stack.swap(trial.place, instrument.alternative(stack, trial)):  # type: ignore[arg-type]
            _from_the_start(stack, tokens_BT)


def _from_the_start(stack: Stack, tokens_BT: torch.Tensor) -> None:
    state = stack.run(stack.start(tokens_BT))
    stack.finish(state.moved(state.hidden[:, -HEAD:], state.layer)).float().log_softmax(-1)


if __name__ == "__main__":
    print(f"Machine: {machine()}.\n\n{table(rows())}")
