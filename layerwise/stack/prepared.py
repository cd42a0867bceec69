"""A stack for inference only, its weights laid out for speed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from layerwise.io.pages import let_go
from layerwise.nets.decoder import Block
from layerwise.nets.direct import LaidOutLinear, PrepackedLinear
from layerwise.nets.native import NativeMatrix
from layerwise.nets.packed import PackedEmbedding
from layerwise.nets.prepared import prepare, prepare_norm
from layerwise.nets.tiered import TieredEmbedding, TieredHead
from layerwise.nets.wide import HalfLinear, Narrow, WideEmbedding, may_widen, widens
from layerwise.stack.decoder import DecoderStack


def prepared(stack: DecoderStack) -> DecoderStack:
    """A stack that computes the same from weights laid out anew; one that is streamed from disk is left as it is.

    Where the processor is slow in the weights' dtype, the new stack computes in float32, and so its spec says. Blocks
    that are swapped in count, hooks do not. Memory of mapped files is let go as they are laid out; other weights are
    held twice while `stack` lives as well.
    """
    if stack.streamed:
        return stack
    blocks = [stack.block(layer) for layer in range(len(stack))]
    wide = stack.dtype if may_widen(stack.device, stack.dtype) and all(map(widens, blocks)) else None
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # laying out is work for one thread
        head = pool.submit(_head, stack, wide)
        laid_out = list(pool.map(partial(_laid_out, wide=wide), blocks))
    spec, embedding = stack.spec, None
    if wide is not None:
        scale = float(torch.tensor(spec.embedding_scale, dtype=wide))
        spec, embedding = replace(spec, dtype="float32", embedding_scale=scale), WideEmbedding(stack.decoder.embedding)
    fast = stack.rebuilt(spec, laid_out, embedding=embedding, head=head.result())
    fast.decoder.norm = prepare_norm(stack.decoder.norm, wide)
    fast.folder = stack.folder
    return fast


def _laid_out(block: nn.Module, wide: torch.dtype | None) -> nn.Module:
    """The block laid out; memory of mapped files that only the block it stands for still needs is let go."""
    if not isinstance(block, Block):
        return block
    new = prepare(block, wide)
    kept = {tensor.data_ptr() for tensor in (*new.parameters(), *new.buffers())}
    let_go(tensor for tensor in (*block.parameters(), *block.buffers()) if tensor.data_ptr() not in kept)
    return new


def _head(stack: DecoderStack, wide: torch.dtype | None) -> nn.Module | None:
    """The output head in a better layout; None where it stays."""
    return _laid_out_table(stack.decoder.embedding if stack.decoder.head is None else stack.decoder.head, wide)


def _laid_out_table(table: nn.Module, wide: torch.dtype | None) -> nn.Module | None:
    if isinstance(table, TieredEmbedding):
        frequent, rare = (_laid_out_table(part, wide) or part for part in (table.frequent, table.rare))
        return TieredHead(frequent, rare, table.place)
    if isinstance(table, nn.Embedding):
        if HalfLinear.fits(table.weight, wide):
            return HalfLinear(table.weight)
        if PrepackedLinear.fits(table.weight):
            return PrepackedLinear(table.weight)
        return None
    if isinstance(table, PackedEmbedding) and (wide is not None or isinstance(table.lay_out(), NativeMatrix)):
        return LaidOutLinear(table)
    return None if wide is None else Narrow(table, wide)
