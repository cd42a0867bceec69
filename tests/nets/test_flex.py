"""Attention from blocks where they lie, beside plain attention to the keys of each row."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from layerwise.nets import flex
from layerwise.nets.softmax import softmax_attention
from layerwise.spec import Attention

SIZE, POOL = 4, 12
TABLES = [[5, 0, 9, 10], [2], [7, 1, 11]]
FIRST = [0, 0, 2]
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
KINDS = {
    "grouped": Attention(4, 2, 16),
    "alone": Attention(4, 4, 16),
    "window": Attention(4, 1, 16, window=5),
    "capped": Attention(4, 2, 16, softcap=3.0, scale=0.7),
}


def some_blocks(start: list[int]) -> flex.Blocks:
    longest = max(map(len, TABLES))
    blocks_RM = torch.tensor([[*table, *[0] * (longest - len(table))] for table in TABLES])
    counts_R = torch.tensor(list(map(len, TABLES)))
    return flex.Blocks.of(blocks_RM, counts_R, torch.tensor(FIRST), torch.tensor(start), POOL, SIZE)


def test_numbers_of_blocks_a_row_has_and_of_those_it_lacks() -> None:
    numbers = some_blocks([0, 0, 0]).numbers_RP
    assert numbers[0, [5, 0, 9, 10]].tolist() == [0, 1, 2, 3] and numbers[2, [7, 1, 11]].tolist() == [2, 3, 4]
    assert numbers[1].tolist() == [0 if block == 2 else flex.FAR for block in range(POOL)]
    assert (numbers == flex.FAR).sum().item() == 3 * POOL - 8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("new", [1, 3, 20])
def test_rows_get_what_plain_attention_gives_them(kind: str, new: int) -> None:
    """Of 20 new tokens some rows have fewer: what lies before their first slot sees nothing and is not looked at."""
    a, generator = KINDS[kind], torch.Generator().manual_seed(new)
    q, k, v = (torch.randn(shape, generator=generator) for shape in (
        (3, a.heads, new, 16), (a.kv_heads, POOL * SIZE, 16), (a.kv_heads, POOL * SIZE, 16)))
    ends = [14, 3, 19]
    found = flex.attend(q, k, v, some_blocks([end - new for end in ends]), a)
    for row, (table, first, end) in enumerate(zip(TABLES, FIRST, ends, strict=True)):
        place = torch.arange(first * SIZE, (first + len(table)) * SIZE)
        slots = torch.tensor([block * SIZE + slot for block in table for slot in range(SIZE)])
        query = torch.arange(end - new, end)[:, None]
        seen = (place <= query) & (place > query - (a.window or 10**6))
        some = seen.any(1)
        exact = softmax_attention(q[row : row + 1], k[None, :, slots], v[None, :, slots], seen[None, None], a)
        assert some.any()
        torch.testing.assert_close(found[row][:, some], exact[0][:, some], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_trying_a_device_tells_right_from_wrong(kind: str) -> None:
    def late(q: Tensor, k: Tensor, v: Tensor, blocks: flex.Blocks, a: Attention) -> Tensor:
        return flex.attend(q, k, v, replace(blocks, start_R=blocks.start_R + 1), a)

    given = KINDS[kind], SIZE, torch.float32, torch.device("cpu"), 5
    assert flex.right(flex.attend, *given)
    assert not flex.right(late, *given)


def test_a_cpu_has_kernels_of_its_own() -> None:
    assert not flex.runs(KINDS["grouped"], SIZE, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.gpu
@NO_GPU
def test_the_kernels_of_this_gpu_are_right(kind: str) -> None:
    assert flex.runs(KINDS[kind], 16, torch.bfloat16, torch.device("cuda"))
