"""Integers of 2 to 8 bits as a dense stream of bytes, lowest bit first, so that 8 codes take `bits` bytes.

Shapes: O rows, I codes in a row, N whole blocks of 8 codes, S stored bytes in a row.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 8


def stored_bytes(columns: int, bits: int) -> int:
    """Bytes that one row of `columns` codes takes."""
    return math.ceil(columns * bits / 8)


def pack(codes_OI: Tensor, bits: int) -> Tensor:
    """Codes below 2**bits, uint8 [O, I], as bytes [O, ceil(I * bits / 8)]."""
    rows, columns = codes_OI.shape
    codes_ON8 = F.pad(codes_OI, (0, -columns % BLOCK)).view(rows, math.ceil(columns / BLOCK), BLOCK)
    bytes_ONb = codes_ON8.new_zeros(rows, codes_ON8.shape[1], bits)
    for index in range(BLOCK):
        byte, shift = divmod(index * bits, 8)
        bytes_ONb[..., byte] |= codes_ON8[..., index] << shift
        if shift + bits > 8:
            bytes_ONb[..., byte + 1] |= codes_ON8[..., index] >> (8 - shift)
    return bytes_ONb.flatten(1)[:, : stored_bytes(columns, bits)].contiguous()


def unpack(bytes_OS: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack`: `columns` codes a row, uint8 [O, I]."""
    rows, stored = bytes_OS.shape
    bytes_ONb = F.pad(bytes_OS, (0, -stored % bits)).view(rows, math.ceil(stored / bits), bits)
    codes_ON8 = bytes_ONb.new_empty(rows, bytes_ONb.shape[1], BLOCK)
    for index in range(BLOCK):
        byte, shift = divmod(index * bits, 8)
        code_ON = bytes_ONb[..., byte] >> shift
        if shift + bits > 8:
            code_ON = code_ON | (bytes_ONb[..., byte + 1] << (8 - shift))
        torch.bitwise_and(code_ON, 2**bits - 1, out=codes_ON8[..., index])
    return codes_ON8.flatten(1)[:, :columns]
