"""Text as token blocks, ready for a language model.

Shapes: N blocks, T tokens of a block.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from layerwise.data import sources
from layerwise.data.batch import Batch, common_prefix, pad, slices
from layerwise.data.split import Split, check_split, divide
from layerwise.errors import BadData, BadOption


class Tokenizer(Protocol):
    """Anything that turns text to token ids.

    An `encode` that takes `special` adds the special tokens of the model only with `special=True`.
    """

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class Source:
    """Where blocks came from: enough to draw the same ones again.

    `where` is a path or name, `sha256` the hash of the split's whole text, `tokens` its length in tokens,
    `chosen` the indices of the blocks taken: block i begins at token i * (tokens of text in a block).
    """

    where: str
    split: str | None
    sha256: str
    tokens: int
    chosen: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class TextData:
    """Blocks of text as token ids, `tokens_NT` int64; `mask_NT` is True at real tokens, None if all are.

    `counts_V` says how often each token comes in all the text that the blocks were drawn from, up to the last that
    does; None where they are all of it.
    """

    tokens_NT: Tensor
    name: str
    source: Source
    mask_NT: Tensor | None = None
    counts_V: Tensor | None = field(default=None, repr=False, compare=False, kw_only=True)

    def __len__(self) -> int:
        return len(self.tokens_NT)

    @property
    def length(self) -> int:
        """Tokens of a block, filling included."""
        return self.tokens_NT.shape[1]

    def batches(self, size: int = 8) -> Iterator[Batch]:
        """The blocks in order, `size` at a time; filling that a whole batch shares is cut off."""
        for rows in slices(len(self), size):
            if self.mask_NT is None:
                yield Batch(self.tokens_NT[rows])
            else:
                width = int(self.mask_NT[rows].sum(1).max())
                mask_BT = self.mask_NT[rows, :width]
                yield Batch(self.tokens_NT[rows, :width], None if bool(mask_BT.all()) else mask_BT)

    def take(self, count: int) -> TextData:
        """The first `count` blocks."""
        return self._part(slice(count))

    def skip(self, count: int) -> TextData:
        """All blocks but the first `count`."""
        return self._part(slice(count, None))

    def rows(self, indices: Sequence[int]) -> TextData:
        """Some blocks, in the order given."""
        mask_NT = None if self.mask_NT is None else self.mask_NT[list(indices)]
        source = dataclasses.replace(self.source, chosen=tuple(self.source.chosen[index] for index in indices))
        return dataclasses.replace(self, tokens_NT=self.tokens_NT[list(indices)], mask_NT=mask_NT, source=source)

    def shortened(self, length: int) -> TextData:
        """The first `length` tokens of every block."""
        mask_NT = None if self.mask_NT is None else self.mask_NT[:, :length]
        return dataclasses.replace(self, tokens_NT=self.tokens_NT[:, :length], mask_NT=mask_NT)

    def without(self, other: TextData) -> TextData:
        """The same blocks, of text in whose counts those of `other`, drawn from the same, are left out."""
        counts_V = token_counts(self)
        theirs_V = torch.bincount(other.tokens_NT.flatten(), minlength=len(counts_V))
        return dataclasses.replace(self, counts_V=(counts_V - theirs_V[: len(counts_V)]).clamp(min=0))

    def _part(self, rows: slice) -> TextData:
        mask_NT = None if self.mask_NT is None else self.mask_NT[rows]
        source = dataclasses.replace(self.source, chosen=self.source.chosen[rows])
        return dataclasses.replace(self, tokens_NT=self.tokens_NT[rows], mask_NT=mask_NT, source=source)

    @classmethod
    def from_text(
        cls,
        text: str,
        tokenizer: Tokenizer,
        *,
        length: int = 512,
        blocks: int | None = None,
        split: Split | None = None,
        seed: int | None = 0,
        name: str = "text",
    ) -> TextData:
        """Blocks of a text given as it is; `split` None uses all of it. Raises as `text_blocks`."""
        if not text.strip():
            raise BadData("an empty text", expected="at least one paragraph", do="give some text")
        parts = [text] if split is None else divide([text])[check_split(split)]
        return _pack(parts, tokenizer, length, blocks, seed, name=name, where=name, split=split)

    @classmethod
    def from_prompts(cls, prompts: Sequence[str], tokenizer: Tokenizer, *, name: str = "prompts") -> TextData:
        """One row for each prompt, filled up on the right. Raises BadData for none, or an empty one."""
        batch = pad(list(map(encoder(tokenizer), prompts)))
        text = "\0".join(prompts)
        tokens = batch.tokens_BT.numel() if batch.mask_BT is None else int(batch.mask_BT.sum())
        source = Source(name, None, _hash(text), tokens, tuple(range(len(prompts))))
        return cls(batch.tokens_BT, name, source, batch.mask_BT)


def text_blocks(
    source: str | Path,
    tokenizer: Tokenizer,
    *,
    length: int = 512,
    blocks: int | None = None,
    split: Split | None = "calibration",
    seed: int | None = 0,
    field: str = "text",
) -> TextData:
    """`blocks` blocks of `length` tokens from one split of a source; all its blocks if `blocks` is None.

    Sources: "default" and "docstrings" (English that comes with Python), "wikitext-2" and "wikitext-2-detokenized"
    (from the folder LAYERWISE_DATA), a .txt, .md or .jsonl file, a folder of them, "hf:<data set>:<split>". What
    belongs to a split depends on the text alone, never on `length`, `blocks` or `seed`; `split` None takes
    all text. Documents follow one another without filling; the rest that fills no block is dropped.
    `seed` draws the blocks at random, in text order (more blocks contain the fewer); None takes the first.

    Special tokens that the tokenizer puts around every text stand around every block.
    Raises BadData for empty or too short text, BadFile for unreadable files, BadOption for an unknown split.
    """
    if split is not None:
        check_split(split)
    if str(source) in sources.WIKITEXT:
        text, where = sources.wikitext(str(source), split)
        parts = [text]
    else:
        found = list(sources.documents(source, field))
        parts, where = found if split is None else divide(found)[split], str(source)
    return _pack(parts, tokenizer, length, blocks, seed, name=Path(source).name, where=where, split=split)


def _pack(
    parts: Sequence[str],
    tokenizer: Tokenizer,
    length: int,
    blocks: int | None,
    seed: int | None,
    *,
    name: str,
    where: str,
    split: str | None,
) -> TextData:
    if length < 2 or (blocks is not None and blocks < 1):
        raise BadOption(
            f"length={length}, blocks={blocks}",
            expected="length of at least 2, blocks of at least 1",
            do="ask for at least one block of two tokens",
        )
    encode = encoder(tokenizer)
    before, after = frame(encode)
    body = length - len(before) - len(after)
    if body < 1:
        raise BadOption(
            f"length={length}",
            expected=f"more than the {length - body} special tokens of a block",
            do="ask for longer blocks",
        )
    ids: list[int] = []
    for part in parts:
        framed = encode(part)
        ids += framed[len(before) : len(framed) - len(after)]
    available, wanted = len(ids) // body, blocks or 1
    if available < wanted:
        raise BadData(
            f"{where}{f' ({split} split)' if split else ''} has {len(ids)} tokens",
            expected=f"at least {wanted * body} tokens, for {wanted} block(s) of {length}",
            do="ask for fewer or shorter blocks, or give more text",
        )
    chosen = _choose(available, blocks, seed)
    all_ids = torch.tensor(ids, dtype=torch.int64)
    tokens_NT = all_ids[: available * body].view(available, body)[chosen]
    sides = [torch.tensor(side, dtype=torch.int64).expand(len(chosen), -1) for side in (before, after)]
    tokens_NT = torch.cat([sides[0], tokens_NT, sides[1]], dim=1)
    source = Source(where, split, _hash("".join(parts)), len(ids), tuple(chosen.tolist()))
    return TextData(tokens_NT, name, source, counts_V=torch.bincount(all_ids))


def token_counts(text: Any) -> Tensor:
    """How often each token comes, [up to the last that does], int64: in all that the blocks were drawn from.

    `text` is a TextData or any other data in batches of tokens.
    """
    counts_V: Tensor | None = getattr(text, "counts_V", None)
    if counts_V is not None:
        return counts_V
    parts = [batch.tokens_BT if batch.mask_BT is None else batch.tokens_BT[batch.mask_BT] for batch in text.batches()]
    return torch.bincount(torch.cat([part.flatten() for part in parts]))


def by_frequency(text: Any, vocabulary: int) -> Tensor:
    """All tokens, [V] int64, the most frequent first; those that are equally frequent in the order of their numbers."""
    counts_V = torch.zeros(vocabulary, dtype=torch.int64)
    found = token_counts(text)[:vocabulary]
    counts_V[: len(found)] = found
    return counts_V.argsort(descending=True, stable=True)


def encoder(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    """The tokenizer's `encode` with the special tokens it adds by itself."""
    encode: Callable[..., list[int]] = tokenizer.encode
    return partial(encode, special=True) if "special" in inspect.signature(encode).parameters else encode


def frame(encode: Callable[[str], list[int]]) -> tuple[list[int], list[int]]:
    """The special tokens that `encode` puts before and after every text."""
    empty = encode("")
    before = common_prefix([empty, encode("a")]) if empty else 0
    return empty[:before], empty[before:]


def _choose(available: int, blocks: int | None, seed: int | None) -> Tensor:
    """Indices of the blocks to take, ascending."""
    if blocks is None or seed is None:
        return torch.arange(available if blocks is None else blocks)
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
    return order[:blocks].sort().values


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
