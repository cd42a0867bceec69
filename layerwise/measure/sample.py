"""Which positions of a text are looked at, when not all are: a sample that batching and order do not change.

Shapes: B rows, T tokens, P positions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor


def sample(tokens_BT: Tensor, allowed_BT: Tensor, count: Callable[[int], int], seed: int) -> Tensor:
    """Sampled positions as indices into the flattened [B, T], int64 [P] in ascending order.

    `count` says how many of a row's allowed positions to take. The draw depends on the seed and the row's
    own allowed tokens, so that neither batching, order nor padding changes it.
    """
    rows = []
    for row, (tokens_T, allowed_T) in enumerate(zip(tokens_BT.cpu(), allowed_BT.cpu(), strict=True)):
        places = allowed_T.nonzero()[:, 0]
        wanted = min(count(len(places)), len(places))
        if wanted < len(places):
            order = torch.randperm(len(places), generator=_generator(tokens_T[places], seed))
            places = places[order[:wanted]].sort().values
        rows.append(row * tokens_BT.shape[1] + places)
    return torch.cat(rows)


def row_keys(tokens_BT: Tensor, allowed_BT: Tensor) -> list[bytes]:
    """What tells rows apart whatever batch, order and padding they come in: a hash of each one's allowed tokens."""
    return [hashlib.sha256(tokens_T[allowed_T].numpy().tobytes()).digest()
            for tokens_T, allowed_T in zip(tokens_BT.cpu(), allowed_BT.cpu(), strict=True)]


def real(tokens_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
    """True at real tokens, bool [B, T]."""
    return torch.ones_like(tokens_BT, dtype=torch.bool) if mask_BT is None else mask_BT.bool()


def predicted(tokens_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
    """True at real tokens that a real token follows, bool [B, T]."""
    real_BT = real(tokens_BT, mask_BT)
    follows_BT = torch.zeros_like(real_BT)
    follows_BT[:, :-1] = real_BT[:, :-1] & real_BT[:, 1:]
    return follows_BT


def _generator(tokens_T: Tensor, seed: int) -> torch.Generator:
    digest = hashlib.sha256(seed.to_bytes(8, "little", signed=True) + tokens_T.numpy().tobytes()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
