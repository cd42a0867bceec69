"""What token tables in tiers lose on text unlike the calibration text: `python -m benchmarks.tiers smollm2 TEXT ...`.

Nothing but the table is changed, rounded to nearest with searched scales, once in one format and once in tiers, whose
frequent tokens are those of the default calibration split. KL to the original, nats per token, on blocks of the
verification split of every TEXT (what `--data` takes; `default` is the kind of text that tokens were counted in).
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch

import layerwise as lw
from benchmarks.common import machine
from layerwise.data.text import by_frequency, text_blocks
from layerwise.report.alternatives import FREQUENT, formats, table_formats, tier_formats
from layerwise.report.optimize import calibration_text, parted
from layerwise.report.verify import compare_on
from layerwise.spec import parse_table_format
from layerwise.stack.decoder import DecoderStack
from layerwise.transform.quantize import pack_table, values

LENGTH = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--tables", default="", help="formats to try, separated by commas, instead of all")
    given = parser.parse_args()
    stack = lw.open(given.model)
    assert isinstance(stack, DecoderStack) and stack.tokenizer is not None
    calibration, _ = parted(calibration_text(stack, "default", 0))
    order_V = by_frequency(calibration, stack.spec.vocabulary)
    texts = [text_blocks(source, stack.tokenizer, length=LENGTH, blocks=given.blocks, split="verification")
             for source in given.texts]
    print(f"{machine()}; {given.blocks} blocks of {LENGTH} tokens\n")
    print(f"| table | bits a number | {' | '.join(text.name for text in texts)} |\n|{'---|' * (2 + len(texts))}")
    plain, weight_VC = formats(stack.spec), values(stack.decoder.embedding)
    for rows in (stack.spec.vocabulary // part for part in sorted(FREQUENT, reverse=True)):
        shares = [float(torch.isin(text.tokens_NT, order_V[:rows]).float().mean()) for text in texts]
        print(f"| share of the {rows} most frequent | | {' | '.join(f'{share:.1%}' for share in shares)} |", flush=True)
    known = [*table_formats(plain), *tier_formats(plain, stack.spec.vocabulary)]
    for label in given.tables.split(",") if given.tables else known:
        format = parse_table_format(label)
        table = pack_table(weight_VC, format, "search", order_V=order_V)
        changed = stack.with_tables(replace(stack.spec, embedding_format=format), embedding=table)
        bits = 8 * format.bytes(*weight_VC.shape) / weight_VC.numel()
        found = [compare_on(stack, changed, text) for text in texts]
        losses = [float(one.kl_N.sum() / one.positions_N.sum()) for one in found]
        print(f"| {label} | {bits:.2f} | {' | '.join(f'{loss:.4f}' for loss in losses)} |", flush=True)


if __name__ == "__main__":
    main()
