"""A stack for inference only, its weights laid out for speed."""

from __future__ import annotations

from torch import nn

from layerwise.nets.decoder import Block
from layerwise.nets.prepared import PrepackedLinear, prepare, prepare_norm
from layerwise.stack.decoder import DecoderStack


def prepared(stack: DecoderStack) -> DecoderStack:
    """A stack that computes the same from weights laid out anew; one that is streamed from disk is left as it is.

    Blocks that are swapped in count, hooks do not. While `stack` lives as well, weights are held twice.
    """
    if stack.streamed:
        return stack
    blocks = [block if not isinstance(block := stack.block(layer), Block) else prepare(block)
              for layer in range(len(stack))]
    table = stack.decoder.embedding if stack.decoder.head is None else stack.decoder.head
    head = None
    if isinstance(table, nn.Embedding) and PrepackedLinear.fits(table.weight):
        head = PrepackedLinear(table.weight)
    fast = stack.rebuilt(stack.spec, blocks, head=head)
    fast.decoder.norm = prepare_norm(stack.decoder.norm)
    fast.folder = stack.folder
    return fast
