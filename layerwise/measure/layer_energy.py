"""Energy of every layer by a stated model: operations times one constant, bytes moved times another.

    E = flops x 2.3 pJ + bytes x 160 pJ

The constants are those of arithmetic in 32 bits and of memory outside the chip in Horowitz 2014 (doi
10.1109/ISSCC.2014.6757323; 45 nm, the lower figure for memory): newer chips need less, so that layers may be compared
with one another and not with a meter. `measure/energy.py` reads meters. Every byte is taken to move once; operations
and bytes follow from a decoder's row and are counted on the first batch for other modules. Cost: none worth naming.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from layerwise.measure.base import Call, PerLayer
from layerwise.measure.cost import flops
from layerwise.measure.roofline import decoding, moved
from layerwise.measure.seen import Vectors
from layerwise.measure.traffic import Traffic
from layerwise.stack.base import Stack
from layerwise.stack.decoder import DecoderStack

FLOP_PJ, BYTE_PJ = 2.3, 160.0


def millijoules(operations: float, moved_bytes: float) -> float:
    """Modelled energy, mJ."""
    return 1e-9 * (FLOP_PJ * operations + BYTE_PJ * moved_bytes)


@dataclass(frozen=True)
class LayerEnergy(PerLayer):
    """Columns `prompt`, for each of `prompt` tokens read at once, and `decode`, for one token written after them."""

    prompt: int = 512

    name: ClassVar[str] = "energy"
    unit: ClassVar[str] = "mJ/token"
    important: ClassVar[None] = None
    about: ClassVar[str] = "energy of the layer by a model of operations and bytes, no meter"

    @property
    def parts(self) -> Mapping[str, str]:
        return {"prompt": self.unit, "decode": self.unit}

    def of(self, stack: Stack, layer: int, call: Call | None) -> Mapping[str, float]:
        if not isinstance(stack, DecoderStack):
            return {} if call is None else self._module(call)
        row, hidden, dtype = stack.spec.rows[layer], stack.spec.hidden, stack.spec.dtype
        prompt = min(self.prompt, stack.spec.context - 1)
        return {"prompt": millijoules(flops(row, hidden, prompt), moved(row, hidden, dtype, prompt) / prompt),
                "decode": millijoules(decoding(row, hidden, prompt), moved(row, hidden, dtype, 1, prompt))}

    def _module(self, call: Call) -> dict[str, float]:
        with Traffic() as traffic:
            call.run()
        tokens = math.prod(Vectors(call.hidden).x_BTC.shape[:2])
        return {"prompt": millijoules(traffic.operations / tokens, traffic.moved / tokens)}
