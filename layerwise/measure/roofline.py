"""How far a layer runs from the hardware's limit: arithmetic intensity, share of peak, share of the roofline.

Source: the roofline of Williams et al. 2009 (doi 10.1145/1498765.1498785); per-layer use as in arXiv 2212.07936.
The limits are measured here (a large matrix product, a sum over memory) unless data-sheet values are given.
For decoders operations and bytes follow from the row; for other modules they are counted while the layer runs on
the first batch. Every byte is taken to move once, so a share may exceed 1 where something stays in a cache.
Cost: timing every layer, and about a second to measure the machine once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from layerwise.measure.base import Call, PerLayer
from layerwise.measure.cost import Cost, flops
from layerwise.measure.hardware import Machine, machine
from layerwise.measure.timing import median_seconds
from layerwise.measure.traffic import Traffic
from layerwise.spec import DTYPE_BYTES, Attention, LayerSpec, StateSpace
from layerwise.stack.base import Stack
from layerwise.stack.decoder import DecoderStack


def moved(row: LayerSpec, hidden: int, dtype: str, tokens: int, past: int = 0) -> float:
    """Bytes that `tokens` new tokens after `past` cached ones move through one layer, each once.

    Weights in their format, inputs and outputs of every matrix, keys and values or a state read and written.
    """
    size = DTYPE_BYTES[dtype]
    total = float(row.bytes(hidden, dtype))
    total += size * tokens * sum(sum(shape) for shapes in row.stored(hidden).values() for shape in shapes)
    if isinstance(row.mixer, Attention):
        keys = min(row.mixer.window or past + tokens, past + tokens)
        total += 2 * size * row.mixer.kv_heads * row.mixer.head_dim * keys
        total += 2 * size * row.mixer.heads * row.mixer.head_dim * tokens
    if isinstance(row.mixer, StateSpace):
        total += 2 * row.mixer.state_bytes(dtype)
    return total


def decoding(row: LayerSpec, hidden: int, past: int) -> float:
    """Operations of one token after `past` cached ones."""
    total = flops(row, hidden, 1)
    if isinstance(row.mixer, Attention):
        keys = min(row.mixer.window or past + 1, past + 1)
        total += 4 * row.mixer.heads * row.mixer.head_dim * (keys - 1)
    return total


@dataclass(frozen=True)
class Roofline(PerLayer):
    """Columns `intensity`, `utilization` (of peak) and `attained` (of the roofline) of a prompt of `prompt` tokens,
    and the intensity and share of the roofline of one token decoded after it.

    `peak` and `bandwidth`, per second, replace measured limits; give both or neither.
    """

    prompt: int = 512
    repeats: int = 5
    peak: float | None = None
    bandwidth: float | None = None

    name: ClassVar[str] = "roofline"
    unit: ClassVar[str] = ""
    important: ClassVar[None] = None
    about: ClassVar[str] = "how far the layer runs from the hardware's limit"

    @property
    def parts(self) -> Mapping[str, str]:
        return {"intensity": "FLOP/byte", "utilization": "of peak", "attained": "of limit",
                "decode-intensity": "FLOP/byte", "decode-attained": "of limit"}

    def limits(self, stack: Stack) -> Machine:
        """The machine's limits in the data type of the model."""
        if self.peak is not None or self.bandwidth is not None:
            return Machine(self.peak or 0.0, self.bandwidth or 0.0)
        return machine(stack.device, getattr(torch, stack.spec.dtype))

    def of(self, stack: Stack, layer: int, call: Call | None) -> Mapping[str, float]:
        limits = self.limits(stack)
        if isinstance(stack, DecoderStack):
            return self._decoder(stack, layer, limits)
        return self._module(stack, call, limits) if call is not None else {}

    def _decoder(self, stack: DecoderStack, layer: int, limits: Machine) -> dict[str, float]:
        row, hidden, dtype = stack.spec.rows[layer], stack.spec.hidden, stack.spec.dtype
        cost = Cost(self.prompt, self.repeats, cold=True)
        prompt, found = cost.tokens(stack), cost.of(stack, layer, None)
        work, traffic = found["flops"] * prompt, moved(row, hidden, dtype, prompt)
        step, later = decoding(row, hidden, prompt), moved(row, hidden, dtype, 1, prompt)
        seconds, decode = found["prefill-ms"] / 1e3, found["decode-ms"] / 1e3
        return {"intensity": work / traffic, "utilization": limits.utilization(work, seconds),
                "attained": limits.attained(work, traffic, seconds), "decode-intensity": step / later,
                "decode-attained": limits.attained(step, later, decode)}

    def _module(self, stack: Stack, call: Call, limits: Machine) -> dict[str, float]:
        with Traffic() as traffic:
            call.run()
        seconds = median_seconds(call.run, self.repeats, stack.device, cold=True)
        return {"intensity": traffic.intensity, "utilization": limits.utilization(traffic.operations, seconds),
                "attained": limits.attained(traffic.operations, traffic.moved, seconds)}
