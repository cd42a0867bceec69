"""One request while it runs: its tokens, how far they are computed, and where its groups keep them."""

from __future__ import annotations

from dataclasses import dataclass, field

from layerwise.serve.prefix import Node
from layerwise.serve.request import Request


@dataclass
class BlockTable:
    """The blocks of one sequence in one group, in slot order.

    A token at position p lies in slot p - `shift`; blocks before number `first` were let go. `kept` are the positions
    in the slots before the shift took effect; the tokens after them are consecutive.
    """

    blocks: list[int] = field(default_factory=list)
    first: int = 0
    shift: int = 0
    kept: list[int] = field(default_factory=list)

    def end(self, block: int) -> int:
        """The slot after the last that the blocks hold."""
        return (self.first + len(self.blocks)) * block

    def contiguous(self) -> bool:
        """Whether the blocks follow one another in memory."""
        start = self.blocks[0] if self.blocks else 0
        return self.blocks == list(range(start, start + len(self.blocks)))


@dataclass(eq=False)
class Sequence:
    """`tokens` are prompt and output; the first `computed` of them are in the cache of every layer.

    `arrival` orders sequences of one priority. `node` is the last of its blocks in the prefix tree. A prompt that
    goes through the layers in several steps has `chunk` tokens that have reached the layer `frontier`.
    """

    request: Request
    arrival: int
    limit: int
    seed: int
    tables: list[BlockTable]
    tokens: list[int] = field(init=False)
    computed: int = 0
    cached: int = 0
    node: Node | None = None
    frontier: int = 0
    chunk: int = 0
    waited: int = 0
    drafted: int = 0
    accepted: int = 0

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def prompt(self) -> int:
        """Number of prompt tokens."""
        return len(self.request.prompt)

    @property
    def output(self) -> list[int]:
        return self.tokens[self.prompt :]

    @property
    def left(self) -> int:
        """Tokens that may still be generated."""
        return self.limit - (len(self.tokens) - self.prompt)

    @property
    def decoding(self) -> bool:
        """Whether only the last token is not computed yet, so that the next step yields a new one."""
        return self.computed == len(self.tokens) - 1 and self.computed >= self.prompt

    def rank(self, patience: int) -> tuple[int, int]:
        """Smaller goes first; every `patience` steps of waiting count like one level of priority."""
        return self.request.priority - self.waited // patience, self.arrival


@dataclass(eq=False)
class Row:
    """Some consecutive tokens of a sequence in one step: from position `start`; logits are wanted of the last `wanted`.

    `drafts` are guesses that follow the tokens, `room` how many there may be. `layers` is the span of layers to run.
    """

    sequence: Sequence
    start: int
    count: int
    wanted: int
    layers: range
    room: int = 0
    drafts: list[int] = field(default_factory=list)

    @property
    def size(self) -> int:
        return self.count + len(self.drafts)

    @property
    def unread(self) -> int:
        """How many of the tokens come before the first whose logits are wanted."""
        return self.count - self.wanted

    @property
    def tokens(self) -> list[int]:
        return self.sequence.tokens[self.start : self.start + self.count] + self.drafts
