"""Who runs in the next step, and with which tokens. Plain Python: lists of tokens and blocks, no tensors.

Every step, running sequences get their next token, prompts on their way get a chunk of what is left of the step's
tokens, and waiting requests join. A sequence for which no block is left sends away the one of lowest rank, which
starts again later from its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from layerwise.serve.caches import Caches
from layerwise.serve.sequence import Row, Sequence


@dataclass(frozen=True)
class Limits:
    """`running` sequences at once, `step_tokens` tokens in a step, `patience` steps of waiting for a level of priority.

    `groups` gives the number of steps in which a prompt of so many tokens passes the layers: 1 is all in one step.
    With `promise`, who joins has room for all it may write, so that nobody is ever sent away.
    """

    running: int = 64
    step_tokens: int = 512
    patience: int = 1000
    groups: Callable[[int], int] = lambda tokens: 1
    promise: bool = False


@dataclass
class Step:
    """Rows to run, and sequences that lost their place since the last step."""

    rows: list[Row] = field(default_factory=list)
    evicted: list[Sequence] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(row.size for row in self.rows)


class Scheduler:
    """Sequences by state, and the next step. `depth` is the number of layers."""

    def __init__(self, caches: Caches, depth: int, limits: Limits) -> None:
        self.caches, self.depth, self.limits = caches, depth, limits
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is, and give its blocks back."""
        if sequence in self.running:
            self.running.remove(sequence)
            self.caches.drop(sequence)
        else:
            self.waiting.remove(sequence)

    def step(self, draft: int = 0) -> Step:
        """The next step; a sequence that decodes gets room for up to `draft` guesses where blocks are free."""
        step, left = Step(), self.limits.step_tokens
        for sequence in sorted(self.running, key=self._rank):
            if sequence in self.running and left > 0:
                left -= self._run_on(sequence, step, left, draft)
        if not step.evicted:
            left -= self._admit(step, left)
        for sequence in self.waiting:
            sequence.waited += 1
        return step

    def commit(self, row: Row, tokens: Iterable[int]) -> None:
        """Take note that `row` ran: it moved on, or its tokens are in every layer and `tokens` follow them.

        As many drafts count as computed as there are `tokens` before the last.
        """
        sequence, new = row.sequence, list(tokens)
        if row.layers.stop < self.depth:
            sequence.frontier, sequence.chunk = row.layers.stop, row.count
            return
        sequence.frontier = sequence.chunk = 0
        sequence.computed = row.start + row.count + max(0, len(new) - 1)
        sequence.tokens.extend(new)
        self.caches.settle(sequence)

    def check(self) -> None:
        """Assert what must hold between steps."""
        assert not set(map(id, self.waiting)) & set(map(id, self.running)), "a sequence both waits and runs"
        assert len(self.running) <= self.limits.running, "too many sequences run"
        for sequence in self.waiting:
            assert sequence.computed == sequence.frontier == 0, "a waiting sequence has progress"
        for sequence in self.running:
            assert sequence.computed < len(sequence.tokens), "a token to compute must be left"
        self.caches.check(self.running)

    # one sequence --------------------------------------------------------------------------------

    def _run_on(self, sequence: Sequence, step: Step, left: int, draft: int) -> int:
        """Add the next row of a running sequence; the number of its tokens, all drafts included."""
        row = self._row(sequence, step, left, draft)
        if row is None:
            return 0
        while not self.caches.reserve(sequence, row.start + row.count):
            if self._preempt(step, spared=step.rows) is sequence:
                return 0
        if row.room and not self.caches.reserve(sequence, row.start + row.count + row.room):
            row.room = 0
        step.rows.append(row)
        return self._cost(row)

    def _row(self, sequence: Sequence, step: Step, left: int, draft: int) -> Row | None:
        start, total = sequence.computed, len(sequence.tokens)
        if sequence.frontier:
            return self._passing(sequence, sequence.chunk)
        end = sequence.prompt if self.caches.table.skipped and start < sequence.prompt else total
        if end - start > 1 and self._groups(end - start) > 1:
            if any(other.frontier for other in self.running) or any(len(row.layers) < self.depth for row in step.rows):
                return None  # one prompt at a time is on its way
            return self._passing(sequence, end - start)
        count = min(end - start, left)
        final = start + count == total
        room = min(draft, left - count, sequence.left - 1) if final and sequence.decoding else 0
        scored = sequence.request.params.prompt_logprobs and start < sequence.prompt
        wanted = count if scored else int(final)
        return Row(sequence, start, count, wanted, range(self.depth), max(0, room))

    def _passing(self, sequence: Sequence, count: int) -> Row:
        """A prompt's next span of layers."""
        groups, first = self._groups(count), sequence.frontier
        ends = [-(-self.depth * (index + 1) // groups) for index in range(groups)]
        last = next(end for end in ends if end > first)
        final = last == self.depth and sequence.computed + count == len(sequence.tokens)
        scored = sequence.request.params.prompt_logprobs and last == self.depth
        return Row(sequence, sequence.computed, count, count if scored else int(final), range(first, last))

    def _groups(self, tokens: int) -> int:
        return max(1, min(self.depth, self.limits.groups(tokens)))

    def _cost(self, row: Row) -> int:
        """Tokens of a step that a row takes: those of all layers together, divided by the number of layers."""
        return max(1, (row.count + row.room) * len(row.layers) // self.depth)

    # who comes and goes --------------------------------------------------------------------------

    def _admit(self, step: Step, left: int) -> int:
        """Let waiting sequences join while there is room for all of their tokens; the tokens they take."""
        taken = 0
        for sequence in sorted(self.waiting, key=self._rank):
            if taken >= left or len(self.running) >= self.limits.running:
                break
            if self.caches.pending(sequence, self.running):
                continue  # another sequence is computing what this one can use
            if not self.caches.admit(sequence, self.running, self.limits.promise):
                break
            self.waiting.remove(sequence)
            self.running.append(sequence)
            taken += self._run_on(sequence, step, left - taken, 0)
        return taken

    def _preempt(self, step: Step, spared: list[Row]) -> Sequence:
        """Send the running sequence of lowest rank that has no row yet back to wait."""
        busy = {id(row.sequence) for row in spared}
        victim = max((other for other in self.running if id(other) not in busy), key=self._rank)
        self.running.remove(victim)
        self.caches.drop(victim)
        victim.computed = victim.frontier = victim.chunk = 0
        self.waiting.append(victim)
        step.evicted.append(victim)
        self.preemptions += 1
        return victim

    def _rank(self, sequence: Sequence) -> tuple[int, int]:
        return sequence.rank(self.limits.patience)
