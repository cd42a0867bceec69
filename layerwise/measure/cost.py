"""What a layer costs: parameters, stored bytes, operations per token, and measured time.

Parameters, bytes and operations follow from the row; times are medians on this machine after a warm-up.
Operations count a multiplication and an addition as two; attention counts the keys that an average token of
a prompt of `prompt` tokens sees. Layers of a module that layerwise did not build are counted and timed on
the first batch of the data; their decode time is nan. Where the processor shows its counters (see `counters.py`), the
pass that is timed is counted once as well: bytes fetched from memory are then measured instead of derived.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from layerwise.measure.base import Call, PerLayer
from layerwise.measure.counters import LINE_BYTES, Counters, counted
from layerwise.measure.seen import Vectors
from layerwise.measure.timing import median_seconds
from layerwise.spec import Attention, LayerSpec, StateSpace
from layerwise.stack.base import Stack
from layerwise.stack.decoder import Caches, DecoderStack

COUNTED = {"cycles": ("cycles", "", 1), "instructions": ("instructions", "", 1),
           "cache-misses": ("memory-bytes", "bytes", LINE_BYTES)}
"""Column, unit and factor of each hardware event."""


def flops(row: LayerSpec, hidden: int, prompt: int) -> float:
    """Operations per token of a prompt of `prompt` tokens: two per weight used, and attention or recurrence itself.

    A state is decayed, added to (an outer product) and read: five operations for each of its numbers.
    """
    experts = row.feed_forward.experts if row.feed_forward else 0
    used = row.feed_forward.experts_per_token / experts if row.feed_forward and experts else 1
    total = 2.0 * experts * hidden
    for name, shapes in row.stored(hidden).items():
        weights = sum(outputs * inputs for outputs, inputs in shapes)
        total += 2 * weights * (used if name in ("gate", "up", "down") else 1)
    if isinstance(row.mixer, Attention):
        window = row.mixer.window or prompt
        keys = sum(min(place, window) for place in range(1, prompt + 1)) / prompt
        total += 4 * row.mixer.heads * row.mixer.head_dim * keys
    if isinstance(row.mixer, StateSpace):
        total += 2 * row.mixer.conv * row.mixer.channels + 5 * row.mixer.inner * row.mixer.state
    return total


@dataclass(frozen=True)
class Cost(PerLayer):
    """Columns `parameters`, `bytes`, `flops`, `prefill-ms` and `decode-ms`, on processors that count for a user's
    process also `cycles`, `instructions` and `memory-bytes` of the prefill.

    Prefill is one prompt of `prompt` tokens (at most the context), decode one further token after it.
    `repeats` measurements follow a warm-up; `cold` empties the processor's caches before each.
    """

    prompt: int = 512
    repeats: int = 5
    cold: bool = False

    name: ClassVar[str] = "cost"
    unit: ClassVar[str] = ""
    important: ClassVar[None] = None
    about: ClassVar[str] = "what the layer costs"

    @property
    def parts(self) -> Mapping[str, str]:
        fixed = {"parameters": "parameters", "bytes": "bytes", "flops": "FLOP/token", "prefill-ms": "ms",
                 "decode-ms": "ms"}
        return fixed | {COUNTED[event][0]: COUNTED[event][1] for event in counted() if event in COUNTED}

    def of(self, stack: Stack, layer: int, call: Call | None) -> Mapping[str, float]:
        row, hidden = stack.spec.rows[layer], stack.spec.hidden
        size = {"parameters": float(row.parameters(hidden)),
                "bytes": float(row.bytes(hidden, stack.spec.dtype))}
        if isinstance(stack, DecoderStack):
            return size | self._decoder(stack, layer)
        return size | (self._module(stack, call) if call is not None else {})

    def tokens(self, stack: DecoderStack) -> int:
        """Tokens of the prompt that is timed."""
        return min(self.prompt, stack.spec.context - self.repeats - 1)

    def _decoder(self, stack: DecoderStack, layer: int) -> dict[str, float]:
        prompt = self.tokens(stack)
        generator = torch.Generator().manual_seed(0)
        tokens_1T = torch.randint(stack.spec.vocabulary, (1, prompt), generator=generator)
        one = slice(layer, layer + 1)
        state = stack.start(tokens_1T)
        work = lambda: stack.run(state.moved(state.hidden, layer), one)  # noqa: E731
        prefill = self._time(stack, work)
        caches: Caches = {}
        stack.run(stack.start(tokens_1T, caches=caches), one)
        steps = iter([stack.start(tokens_1T[:, -1:], caches=caches) for _ in range(self.repeats + 1)])
        decode = self._time(stack, lambda: stack.run(next(steps), one))
        return {"flops": flops(stack.spec.rows[layer], stack.spec.hidden, prompt),
                "prefill-ms": prefill, "decode-ms": decode, **_counts(stack, work)}

    def _module(self, stack: Stack, call: Call) -> dict[str, float]:
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            call.run()
        tokens = math.prod(Vectors(call.hidden).x_BTC.shape[:2])
        return {"flops": counter.get_total_flops() / tokens, "prefill-ms": self._time(stack, call.run),
                **_counts(stack, call.run)}

    def _time(self, stack: Stack, call: Callable[[], object]) -> float:
        """Median milliseconds."""
        return 1e3 * median_seconds(call, self.repeats, stack.device, cold=self.cold)


def _counts(stack: Stack, work: Callable[[], object]) -> dict[str, float]:
    """What the processor counts during one run; nothing for an accelerator or where it shows no counters."""
    events = [event for event in counted() if event in COUNTED] if stack.device.type == "cpu" else []
    if not events:
        return {}
    with Counters(events) as counters:
        work()
    return {COUNTED[event][0]: float(counters.counts[event] * COUNTED[event][2]) for event in events}
