"""Attention of new tokens straight from the blocks of a pool on an NVIDIA GPU, by torch's FlexAttention; no key is
copied.

To the kernel all rows look at the same keys, those of the whole pool. Its block mask says which blocks a row has; where
a slot lies in the row follows from the block's number there. Whether this GPU and this torch can do it is tried once a
kind of attention, on small rows, beside plain attention; where not, keys are gathered.

Shapes: R rows, T new tokens of the longest, M blocks of the longest, P blocks of the pool, S slots of the pool,
H query heads, K key heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from layerwise import spec
from layerwise.nets.softmax import softmax_attention

FAR = 1 << 24
"""The number of a block that a row does not have: behind every token."""

FEW, MANY = 16, 128
"""New tokens that a program of the kernel takes at once, where the longest row has at most as many and where not."""

Attend = Callable[[Tensor, Tensor, Tensor, "Blocks", spec.Attention], Tensor]


@dataclass(frozen=True)
class Blocks:
    """Where rows have their keys in pools of one kind: `blocks_RM`, of which row r has `counts_R[r]`; its new tokens
    begin at its place `start_R[r]`. `numbers_RP` says of every block of a pool which one it is in each row, FAR where
    the row lacks it. Blocks have `size` slots.
    """

    blocks_RM: Tensor
    counts_R: Tensor
    start_R: Tensor
    numbers_RP: Tensor
    size: int

    @staticmethod
    def of(blocks_RM: Tensor, counts_R: Tensor, first_R: Tensor, start_R: Tensor, pool: int, size: int) -> Blocks:
        """From tables, all int64, whose first block is number `first_R[r]` in row r, for pools of `pool` blocks."""
        rows, columns = blocks_RM.shape
        column_M = torch.arange(columns, device=blocks_RM.device)
        kept_RM = torch.where(column_M < counts_R[:, None], blocks_RM, pool)  # what only fills up goes last
        numbers_RP = blocks_RM.new_full((rows, pool + 1), FAR)
        numbers_RP.scatter_(1, kept_RM, first_R[:, None] + column_M)
        return Blocks(blocks_RM.int(), counts_R.int(), start_R, numbers_RP[:, :pool].int(), size)


def attend(q_RHTD: Tensor, k_KSD: Tensor, v_KSD: Tensor, blocks: Blocks, a: spec.Attention) -> Tensor:
    """What new tokens get from all slots they see, [R, H, T, D]; their own keys are in the pool already."""
    new = q_RHTD.shape[2]
    slots, size, window, cap = k_KSD.shape[1], blocks.size, a.window, a.softcap
    numbers_RP, start_R = blocks.numbers_RP, blocks.start_R

    def seen(row: Tensor, head: Tensor, token: Tensor, slot: Tensor) -> Tensor:
        place = numbers_RP[row, slot // size] * size + slot % size
        now = start_R[row] + token
        return (place <= now) if window is None else (place <= now) & (place > now - window)

    def capped(score: Tensor, row: Tensor, head: Tensor, token: Tensor, slot: Tensor) -> Tensor:
        assert cap is not None
        return cap * torch.tanh(score / cap)

    together = FEW if new <= FEW else MANY
    programs = -(-new // together)
    mask = BlockMask.from_kv_blocks(
        blocks.counts_R[:, None, None].expand(-1, 1, programs).contiguous(),
        blocks.blocks_RM[:, None, None].expand(-1, 1, programs, -1).contiguous(),
        BLOCK_SIZE=(together, size), mask_mod=seen, seq_lengths=(new, slots), compute_q_blocks=False)
    out = flex_attention(
        q_RHTD, k_KSD[None], v_KSD[None], block_mask=mask, score_mod=None if cap is None else capped,
        scale=a.head_dim**-0.5 if a.scale is None else a.scale, enable_gqa=a.heads > a.kv_heads,
        kernel_options={"BLOCK_M": together, "BLOCK_N": size, "BACKEND": "TRITON"})
    assert isinstance(out, Tensor)
    return out


@lru_cache
def compiled() -> Attend:
    """`attend` in kernels of its own for each kind of attention, for any number of rows, tokens and blocks."""
    from torch._dynamo import config

    # sizes of tensors vary from call to call, the plain numbers of a kind of attention do not
    return config.patch(specialize_int=True, specialize_float=True)(torch.compile(attend, dynamic=True))  # type: ignore[no-any-return]


@lru_cache
def runs(a: spec.Attention, size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device can do `a` on blocks of `size` slots, and what comes out is right.

    Its kernels are compiled on the way, so that no later pass finds out what the compiler does not know.
    """
    if device.type != "cuda":
        return False
    try:
        return all(right(compiled(), a, size, dtype, device, new) for new in (1, FEW + 1))
    except Exception:  # whatever the compiler, the driver or the kernel does not know
        return False


def right(attend: Attend, a: spec.Attention, size: int, dtype: torch.dtype, device: torch.device, new: int) -> bool:
    """Whether `attend` gives `new` tokens of rows whose blocks lie anywhere what plain attention gives them."""
    generator, width = torch.Generator().manual_seed(0), a.head_dim
    count = -(-new // size) + 1
    table_RM = torch.randperm(3 * count, generator=generator).view(3, count).to(device)
    ends = [count * size, count * size - 1, new]
    shapes = (3, a.heads, new, width), *(2 * [(a.kv_heads, 3 * count * size, width)])
    q_RHTD, k_KSD, v_KSD = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    start_R = torch.tensor(ends, device=device) - new
    counts_R, first_R = torch.full_like(start_R, count), torch.zeros_like(start_R)
    blocks = Blocks.of(table_RM, counts_R, first_R, start_R, 3 * count, size)
    found_RHTD = attend(q_RHTD, k_KSD, v_KSD, blocks, a)
    slot = torch.arange(size, device=device)
    for row, end in enumerate(ends):
        slots_S = (table_RM[row, :, None] * size + slot).flatten()[:end]
        ago_TS = torch.arange(end - new, end, device=device)[:, None] - torch.arange(end, device=device)
        seen_TS = (ago_TS >= 0) & (ago_TS < (a.window or end))
        exact = softmax_attention(q_RHTD[row, None], k_KSD[None, :, slots_S], v_KSD[None, :, slots_S],
                                  seen_TS[None, None], a)
        if not torch.allclose(found_RHTD[row], exact[0], atol=0.02, rtol=0.02):
            return False
    return True
