"""The compiled attention beside softmax attention on gathered keys in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.nets.attend import Attended, HeadNorms, Pages, Places, attend, attends
from layerwise.nets.attention import rotate
from layerwise.nets.compiled import library
from layerwise.nets.flow import Flow
from layerwise.nets.key_codes import KEY_CODES, as_kept
from layerwise.spec import Attention, Precision, Rope

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler with OpenMP")

BLOCK, EPS = 4, 1e-3
PLAIN = Attention(heads=6, kv_heads=2, head_dim=16)
KINDS = {
    "plain": PLAIN, "one key head": replace(PLAIN, kv_heads=1), "window": replace(PLAIN, window=5),
    "soft cap": replace(PLAIN, softcap=3.0), "scale": replace(PLAIN, scale=0.5),
    "no rotation": replace(PLAIN, rope=None), "half rotated": replace(PLAIN, rope=Rope(part=0.5)),
    "wide heads": replace(PLAIN, head_dim=64), "norms of heads": replace(PLAIN, qk_norm=True)}
ROWS = [(0, 1), (6, 1), (9, 3), (17, 2)]
"""Of every sequence the tokens before and the new ones."""


class World:
    """Sequences whose blocks lie in no order, and the same keys in one piece."""

    def __init__(self, a: Attention, dtype: torch.dtype, kept: torch.dtype | None = None,
                 rows: list[tuple[int, int]] = ROWS, block: int = BLOCK, shared: int = 0,
                 precision: Precision = "model") -> None:
        """Every other sequence that can has its first `shared` blocks from the first that can."""
        draw = torch.Generator().manual_seed(0)
        self.a, self.dtype, self.block, self.precision = a, dtype, block, precision
        needed = [-(-(past + new) // block) for past, new in rows]
        order = torch.randperm(sum(needed) + 2, generator=draw).tolist()
        self.blocks = [[order.pop() for _ in range(count)] for count in needed]
        able = [index for index, (past, _) in enumerate(rows) if past >= shared * block]
        for index in able[::2]:
            self.blocks[index][:shared] = self.blocks[able[0]][:shared]
        shape = a.kv_heads, (sum(needed) + 2) * block, a.head_dim
        self.k, self.v = (as_kept(torch.randn(shape, generator=draw).to(kept or dtype), precision) for _ in range(2))
        self.parts = [[x] if precision == "model" else KEY_CODES[precision].encode(x) for x in (self.k, self.v)]
        tokens = sum(new for _, new in rows)
        self.qkv = torch.randn(tokens, (a.heads + 2 * a.kv_heads) * a.head_dim, generator=draw).to(dtype)
        self.places = [place for past, new in rows for place in range(past, past + new)]
        self.row = [index for index, (_, new) in enumerate(rows) for _ in range(new)]
        self.flow = Flow(torch.tensor([self.places]), dtype=dtype)
        self.q_norm, self.k_norm = torch.rand(2, a.head_dim, generator=draw) + 0.5

    def slots(self, row: int, stop: int) -> list[int]:
        return [self.blocks[row][slot // self.block] * self.block + slot % self.block for slot in range(stop)]

    def found(self, first: int = 0, tokens: slice = slice(None)) -> Tensor:
        """From the compiled function, for some tokens, the first `first` blocks of every long sequence let go."""
        firsts = [first if len(blocks) > first + 1 else 0 for blocks in self.blocks]
        longest = max(map(len, self.blocks))
        table = [blocks[gone:] + [0] * (longest - len(blocks) + gone)
                 for blocks, gone in zip(self.blocks, firsts, strict=True)]
        new = [self.slots(row, place + 1)[-1] for row, place in zip(self.row, self.places, strict=True)]
        row = self.row[tokens]
        order = sorted(range(len(row)), key=lambda token: (self.blocks[row[token]], token))
        places = Places(*map(torch.tensor, (new[tokens], row, self.places[tokens], order, firsts, table)))
        a, flow = self.a, Flow(torch.tensor([self.places[tokens]]), dtype=self.dtype)
        rotation = None if a.rope is None else flow.rotation(a.rope, int(a.head_dim * a.rope.part))
        norms = HeadNorms(self.q_norm, self.k_norm, EPS) if a.qk_norm else None
        attended = Attended(a, *self.parts, self.block, self.precision)
        return attend(self.qkv[tokens], Pages(attended, places, rotation), norms)

    def expected(self, first: int = 0) -> Tensor:
        a = self.a
        heads = self.qkv.view(len(self.places), -1, a.head_dim).transpose(0, 1)[None]
        both, v_new = heads[:, : a.heads + a.kv_heads], heads[0, a.heads + a.kv_heads :]
        if a.qk_norm:
            weights = torch.cat([self.q_norm.expand(a.heads, 1, -1), self.k_norm.expand(a.kv_heads, 1, -1)])
            both = (F.rms_norm(both.double(), (a.head_dim,), eps=EPS) * weights).to(self.dtype)
        both = both if a.rope is None else rotate(both, self.flow, a)
        q, k_new = both[0, : a.heads].double(), both[0, a.heads :]
        k, v = self.k.clone(), self.v.clone()
        for token, (row, place) in enumerate(zip(self.row, self.places, strict=True)):
            slot = self.slots(row, place + 1)[-1]
            k[:, slot], v[:, slot] = (as_kept(x[:, token].to(x.dtype), self.precision) for x in (k_new, v_new))
        out = []
        for token, (row, place) in enumerate(zip(self.row, self.places, strict=True)):
            start = first * self.block if len(self.blocks[row]) > first + 1 else 0
            start = max(start, 0 if a.window is None else place + 1 - a.window)
            slots = self.slots(row, place + 1)[start:]
            of_head = [head // (a.heads // a.kv_heads) for head in range(a.heads)]
            keys, values = k[of_head][:, slots].double(), v[of_head][:, slots].double()
            logits = torch.einsum("hd,hsd->hs", q[:, token], keys) * (a.head_dim**-0.5 if a.scale is None else a.scale)
            logits = logits if a.softcap is None else a.softcap * torch.tanh(logits / a.softcap)
            out.append(torch.einsum("hs,hsd->hd", logits.softmax(-1), values).flatten())
        return torch.stack(out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_what_tokens_get(kind: str, dtype: torch.dtype) -> None:
    world = World(KINDS[kind], dtype)
    expected = world.expected()
    tolerance = 2e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(world.found().double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_keys_of_half_precision_beside_tokens_of_float32(kind: str) -> None:
    """Only what is kept is rounded, once."""
    world = World(KINDS[kind], torch.float32, kept=torch.bfloat16)
    expected = world.expected()
    torch.testing.assert_close(world.found().double(), expected, rtol=2e-4, atol=2e-4)


LARGE = replace(PLAIN, head_dim=64)
PROMPTS = [(0, 70), (33, 1), (5, 37), (128, 2)]
MANY = {
    "plain": LARGE, "window": replace(LARGE, window=20), "narrow heads": replace(PLAIN, head_dim=32),
    "not a power of two": replace(PLAIN, head_dim=96), "no whole panel": replace(PLAIN, head_dim=40),
    "half rotated": replace(LARGE, rope=Rope(part=0.5)),
    "norms of heads": replace(LARGE, qk_norm=True), "soft cap": replace(LARGE, softcap=3.0),
    "more heads than a tile has": replace(LARGE, heads=50, kv_heads=1), "a key head each": replace(LARGE, kv_heads=6),
    "wide heads": replace(PLAIN, head_dim=128)}
SHARING = [(200, 1), (67, 1), (64, 20), (130, 1), (300, 1), (150, 3), (64, 1), (0, 30), (90, 1)]
"""Rows of which some see the same slots."""
WORLDS = pytest.mark.parametrize(("rows", "block", "shared"), [(PROMPTS, 4, 0), (PROMPTS, 16, 0), (PROMPTS, 32, 0),
                                                               (SHARING, 16, 4), (SHARING, 32, 2)])


STREAMS = pytest.mark.parametrize(("dtype", "kept", "tolerance"), [
    (torch.bfloat16, torch.bfloat16, 2e-2), (torch.float32, torch.bfloat16, 1e-3),
    (torch.float32, torch.float32, 1e-5)], ids=["bfloat16", "float32 with keys of bfloat16", "float32"])


@WORLDS
@STREAMS
@pytest.mark.parametrize("kind", MANY)
def test_what_the_tokens_of_prompts_get(kind: str, dtype: torch.dtype, kept: torch.dtype, tolerance: float,
                                        rows: list[tuple[int, int]], block: int, shared: int) -> None:
    world = World(MANY[kind], dtype, kept, rows=rows, block=block, shared=shared)
    expected = world.expected()
    torch.testing.assert_close(world.found().double(), expected, rtol=tolerance, atol=tolerance)


@WORLDS
@STREAMS
@pytest.mark.parametrize("kind", MANY)
def test_a_token_does_not_depend_on_those_it_comes_with(kind: str, dtype: torch.dtype, kept: torch.dtype,
                                                        tolerance: float, rows: list[tuple[int, int]], block: int,
                                                        shared: int) -> None:
    world = World(MANY[kind], dtype, kept, rows=rows, block=block, shared=shared)
    together = world.found()
    alone = torch.cat([world.found(tokens=slice(token, token + 1)) for token in range(len(together))])
    parts = torch.cat([world.found(tokens=slice(first, first + 23)) for first in range(0, len(together), 23)])
    assert torch.equal(together, alone) and torch.equal(together, parts)


@pytest.mark.parametrize(("a", "dtype", "tolerance"), [(PLAIN, torch.float32, 2e-6), (LARGE, torch.bfloat16, 2e-2)])
def test_blocks_that_were_let_go_are_not_seen(a: Attention, dtype: torch.dtype, tolerance: float) -> None:
    world = World(a, dtype)
    expected = world.expected(first=2)
    torch.testing.assert_close(world.found(first=2).double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("a", "dtype", "tolerance"), [(PLAIN, torch.float32, 2e-6), (LARGE, torch.bfloat16, 2e-2)])
def test_slots_that_nobody_sees_do_not_matter(a: Attention, dtype: torch.dtype, tolerance: float) -> None:
    """What another sequence or an earlier user left there, even if it is no number."""
    world = World(a, dtype)
    expected = world.expected()
    mine = {slot for row, (past, new) in enumerate(ROWS) for slot in world.slots(row, past + new)}
    others = [slot for slot in range(world.k.shape[1]) if slot not in mine]
    world.k[:, others] = world.v[:, others] = float("nan")
    torch.testing.assert_close(world.found().double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "precision", "tolerance"), [
    (torch.float32, "int8", 1e-5), (torch.float32, "int4", 1e-5), (torch.bfloat16, "int8", 2e-2),
    (torch.bfloat16, "int4", 0.15)])  # the reference rounds keys to bfloat16 first, which may move one of 16 codes
@pytest.mark.parametrize("kind", MANY)
def test_keys_and_values_as_codes(kind: str, dtype: torch.dtype, precision: Precision, tolerance: float) -> None:
    """What is computed from bfloat16 is kept as codes of its float32, without another rounding."""
    world = World(MANY[kind], dtype, torch.float32, rows=SHARING, block=16, shared=4, precision=precision)
    expected = world.expected()
    torch.testing.assert_close(world.found().double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("width", [8, 24, 32, 64, 96, 160])
def test_codes_are_those_of_the_plain_cache(width: int, precision: Precision) -> None:
    """Also numbers of all sizes, and none."""
    a = Attention(heads=2, kv_heads=2, head_dim=width, rope=None)
    world = World(a, torch.float32, rows=[(0, 70)], block=16, precision=precision)
    world.qkv *= torch.logspace(-14, 6, 70)[:, None]
    world.qkv[3], world.qkv[5, 2 * width : 3 * width] = 0.0, 7.0
    slots, (keys, values) = world.slots(0, 70), world.qkv.view(70, 6, width).transpose(0, 1)[2:].split(2)
    world.found()
    for parts, new in zip(world.parts, (keys, values), strict=True):
        for part, right in zip(parts, KEY_CODES[precision].encode(new), strict=True):
            assert torch.equal(part[:, slots], right)


def test_a_sequence_does_not_depend_on_its_mates() -> None:
    world, other = World(PLAIN, torch.float32), World(PLAIN, torch.float32)
    other.qkv[0] = float("nan")
    both, spoilt = world.found(), other.found()
    assert spoilt[0].isnan().all() and torch.equal(both[1:], spoilt[1:])


def test_what_it_cannot_do_is_said() -> None:
    cpu = torch.device("cpu")
    assert attends(PLAIN, torch.float32, cpu)
    assert not attends(replace(PLAIN, head_dim=12), torch.float32, cpu)
    assert not attends(PLAIN, torch.float16, cpu) and not attends(PLAIN, torch.float32, torch.device("cuda"))
