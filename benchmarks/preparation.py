"""What is left of GPTQ's output error after each way to prepare a layer for rounding.

    python -m benchmarks.preparation smollm2 --layers 1,9 --blocks 2
    python -m benchmarks.preparation smollm2 --dithered

A layer is scaled (`scale-inputs`), its values rotated at random (`rotate-values`) or by learned rotations
(`learn-rotation`), or both; then every matrix is rounded by GPTQ. The table holds geometric means over layers of
the squared output error divided by that of GPTQ alone, on the calibration text and on text that nothing was fitted to.

Models whose weights were stored in 4 bits before, as those of both demo models were, lie on grids that rotation leaves.
`--dithered` adds to each weight uniform noise as wide as the steps of groups of 32 in 4 bits: weights of the same kind
which lie on no grid.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

import layerwise as lw
from benchmarks.common import machine
from layerwise.data.text import text_blocks
from layerwise.measure.output_error import ROWS, sampled
from layerwise.nets.decoder import Block
from layerwise.nets.dense import Dense
from layerwise.spec import Attention, Format, LayerSpec
from layerwise.stack.base import State
from layerwise.stack.decoder import DecoderStack
from layerwise.transform.gptq import gptq
from layerwise.transform.gptq import output_error as error_rows
from layerwise.transform.gram import SAME_INPUT, grams
from layerwise.transform.learn_rotation import LearnRotation
from layerwise.transform.quantize import SEARCH_STEPS, values
from layerwise.transform.rotate import RotateValues, fold_rotation, rotated_gram, rotation
from layerwise.transform.scale_inputs import Read, ScaleInputs

WAYS = ("scaled", "rotated at random", "learned rotation", "scaled, then learned rotation")
FAMILIES = {"q": "q, k", "k": "q, k", "gate": "gate, up", "up": "gate, up"}
Grams = Mapping[str, Tensor]


@dataclass(frozen=True)
class Prepared:
    """A block, the Gram matrices of its inputs on both texts, and what each matrix's outputs must be multiplied by."""

    block: Block
    calibration: Grams
    held_out: Grams
    units: Mapping[str, Tensor]

    def errors(self, format: Format) -> dict[str, tuple[float, float]]:
        """Squared output error of every family of matrices after GPTQ, on both texts, over a sample of outputs."""
        found: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
        for name, matrix in self.block.matrices().items():
            weight_OI = sampled(values(matrix), ROWS)
            rounded = gptq(weight_OI, self.calibration[name], format, search=SEARCH_STEPS)
            unit_O = sampled(self.units.get(name, torch.ones(len(values(matrix))))[:, None], ROWS)[:, 0].square()
            seen, unseen = (float((error_rows(weight_OI, gram[name], rounded, format) * unit_O).sum())
                            for gram in (self.calibration, self.held_out))
            before = found[FAMILIES.get(name, name)]
            found[FAMILIES.get(name, name)] = before[0] + seen, before[1] + unseen
        return dict(found)


def scaled(before: Prepared, row: LayerSpec, format: Format, reads: tuple[Read, ...]) -> Prepared:
    """What `reads` names scaled for a format; v is divided by what o is multiplied by, up by what down is."""
    transform = ScaleInputs(format.bits, format.group, format.symmetric, inputs=reads)
    block = transform.apply(before.block, row, before.calibration)
    factor = {name: values(matrix).norm(dim=0) / values(before.block.matrix(name)).norm(dim=0)
              for name, matrix in block.matrices().items()}
    factor |= {name: factor[first] for name, first in SAME_INPUT.items() if first in factor}
    units = dict(before.units)
    if "down" in reads:
        units["up"] = factor["down"]
    if "o" in reads and isinstance(row.mixer, Attention):
        units["v"] = factor["o"].view(row.mixer.kv_heads, -1, row.mixer.head_dim)[:, 0].flatten()
    calibration, held_out = ({name: gram[name] / factor[name] / factor[name][:, None] for name in gram}
                             for gram in (before.calibration, before.held_out))
    return Prepared(block, calibration, held_out, units)


def turned(before: Prepared, row: LayerSpec, learned: bool) -> Prepared:
    """Values rotated."""
    mixer = cast(Attention, row.mixer)
    if learned:
        turn_KDD = LearnRotation().learned(before.block, mixer, before.calibration)
    else:
        generator = torch.Generator().manual_seed(RotateValues().seed)
        turn_KDD = torch.stack([rotation(mixer.head_dim, generator) for _ in range(mixer.kv_heads)])
    block = fold_rotation(before.block, mixer, turn_KDD)
    calibration, held_out = ({**gram, "o": rotated_gram(gram["o"], mixer, turn_KDD)}
                             for gram in (before.calibration, before.held_out))
    return Prepared(block, calibration, held_out, before.units)


def dithered(block: Block, seed: int) -> Block:
    """Each weight moved within the step that its group of 32 has in 4 bits."""
    generator, new = torch.Generator().manual_seed(seed), {}
    for name, matrix in block.matrices().items():
        grouped = values(matrix).float().unflatten(1, (-1, 32))
        step = (grouped.amax(2, keepdim=True) - grouped.amin(2, keepdim=True)) / 15
        noise = torch.rand(grouped.shape, generator=generator) - 0.5
        new[name] = Dense.of((grouped + noise * step).flatten(1), matrix.bias)
    return block.with_matrices(new)


def measured(plain: Prepared, row: LayerSpec, format: Format) -> dict[tuple[str, str], tuple[float, float]]:
    """What is left of the error, by way and family, on both texts."""
    most = scaled(plain, row, format, ("qkv", "gate_up", "down"))
    ways = (scaled(most, row, format, ("o",)), turned(plain, row, False), turned(plain, row, True),
            turned(most, row, True))
    base = plain.errors(format)
    return {(way, family): (seen / base[family][0], unseen / base[family][1])
            for way, prepared in zip(WAYS, ways, strict=True)
            for family, (seen, unseen) in prepared.errors(format).items()}


def moved(block: Block, layer: int, states: list[State]) -> list[State]:
    return [state.moved(block(state.hidden, state.shared, layer), layer + 1) for state in states]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--layers", default="1,9")
    parser.add_argument("--formats", default="4/64,3/64,2/64")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--dithered", action="store_true")
    given = parser.parse_args()
    began, layers = time.process_time(), [int(layer) for layer in given.layers.split(",")]
    stack = lw.open(given.model)
    assert isinstance(stack, DecoderStack)
    texts = (text_blocks("default", stack.tokenizer, blocks=given.blocks, split="calibration"),
             text_blocks("default", stack.tokenizer, blocks=given.blocks, split="verification"))
    calibration, held_out = ([stack.start(batch.tokens_BT, batch.mask_BT) for batch in text.batches(4)]
                             for text in texts)
    found: dict[tuple[str, str, str], list[tuple[float, float]]] = defaultdict(list)
    for layer in range(max(layers) + 1):
        block, row = cast(Block, stack.block(layer)), stack.spec.rows[layer]
        if layer in layers:
            plain = Prepared(dithered(block, layer) if given.dithered else block, grams(block, layer, calibration),
                             grams(block, layer, held_out), {})
            for label in given.formats.split(","):
                for (way, family), ratios in measured(plain, row, Format.parse(label)).items():
                    found[label, way, family].append(ratios)
        calibration, held_out = moved(block, layer, calibration), moved(block, layer, held_out)
    families = list(dict.fromkeys(family for _, _, family in found))
    print(f"{given.model}{', dithered' if given.dithered else ''}, layers {given.layers}; {given.blocks} blocks of 512 "
          f"tokens of each text; {machine()}; {time.process_time() - began:.0f} s of processor time.\n")
    print("\n".join([f"| format | prepared | {' | '.join(families)} |", f"|{'---|' * (len(families) + 2)}"]))
    for label, way in dict.fromkeys((label, way) for label, way, _ in found):
        cells = [" / ".join(f"{math.exp(sum(map(math.log, each)) / len(each)):.2f}"
                            for each in zip(*found[label, way, family], strict=True)) for family in families]
        print(f"| {label} | {way} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
