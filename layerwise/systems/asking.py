"""Sums asked of a language model, and all the ways in which it answers. An answer is one digit, one token.

Shapes: N items, B of a batch, D depths (layers + 1), R rules, S samples, K digits, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.generate.dola import contrast
from layerwise.generate.sample import Sampling
from layerwise.stack.decoder import DecoderStack
from layerwise.stack.tail import Tail

DIGITS, OTHER, CHOICES = 10, 10, 11
"""Answers are digits; anything else counts as one more."""
RULES = (Sampling(), Sampling(1.0), Sampling(1.0, top_k=50), Sampling(1.0, top_p=0.95))
SIGNS = ("+", "-", "*")


@dataclass(frozen=True)
class Sum:
    """`left sign right`, such as 5 + 3, with a result of one digit, and a step on the way to it."""

    left: int
    sign: str
    right: int

    @property
    def result(self) -> int:
        return {"+": self.left + self.right, "-": self.left - self.right, "*": self.left * self.right}[self.sign]

    @property
    def question(self) -> str:
        return f"{self.left} {self.sign} {self.right} ="

    @property
    def reasoning(self) -> str:
        step = {
            "+": f"{self.left + 1} + {self.right - 1}",
            "-": f"{self.left - 1} - {self.right - 1}",
            "*": f"{self.left * (self.right - 1)} + {self.left}",
        }[self.sign]
        return f"{self.question} {step} = {self.result}"


@dataclass(frozen=True)
class Readings:
    """What was answered to every item: by the lens at every depth, by DoLa, by four rules, by ten samples."""

    lens_ND: Tensor
    dola_N2: Tensor
    rules_NR: Tensor
    samples_NS: Tensor
    certainty_N: Tensor


class Asking:
    """A model, worked examples, and the tokens of the digits."""

    def __init__(self, stack: DecoderStack, seed: int) -> None:
        self.stack, self.seed = stack, seed
        draw = random.Random(seed + 1)
        self.examples = [item for sign in SIGNS for item in items(2, sign, draw)]
        assert stack.tokenizer is not None
        self.encode = stack.tokenizer.encode
        self.digits_K = torch.tensor([self.encode(str(digit))[-1] for digit in range(DIGITS)])

    def rows(self, sums: Sequence[Sum], reasoning: bool = False) -> tuple[list[list[int]], int]:
        """Prompts that end where the answer begins, and where the question begins in them."""
        shown = [s.reasoning if reasoning else f"{s.question} {s.result}" for s in self.examples]
        before = "\n".join(shown) + "\n"
        return [self.encode(f"{before}{s.question} ") for s in sums], len(self.encode(before))

    def tail(self, sums: Sequence[Sum]) -> Tail:
        rows, place = self.rows(sums)
        return Tail(self.stack, rows, [place] * len(rows))

    def answer(self, tokens: Tensor) -> Tensor:
        """Tokens as digits; others as OTHER."""
        same = tokens[..., None] == self.digits_K
        return torch.where(same.any(-1), same.int().argmax(-1), OTHER)


def items(count: int, signs: Sequence[str], draw: random.Random) -> list[Sum]:
    """Sums, differences or products of digits from 1 to 9 whose result is one digit."""
    found: list[Sum] = []
    while len(found) < count:
        new = Sum(draw.randint(1, 9), draw.choice(signs), draw.randint(1, 9))
        if 0 <= new.result < DIGITS:
            found.append(new)
    return found


@torch.inference_mode()
def fitting(asking: Asking, tried: int) -> tuple[str, ...]:
    """The kinds of sums of which 30 to 80 % are answered rightly, on items used for nothing else; all if none."""
    kept = []
    for kind in SIGNS:
        sums = items(tried, (kind,), random.Random(asking.seed + 3))
        tail = asking.tail(sums)
        greedy_N = asking.answer(tail.last(tail.run(tail.enter())).argmax(-1))
        share = float((greedy_N == torch.tensor([s.result for s in sums])).float().mean())
        kept += [kind] if 0.3 <= share <= 0.8 else []
    return tuple(kept) or SIGNS


@torch.inference_mode()
def read(asking: Asking, sums: Sequence[Sum], batch: int = 25) -> Readings:
    """Answers at every depth and by every rule, from one pass."""
    parts: list[list[Tensor]] = []
    generator, depths = torch.Generator().manual_seed(asking.seed), len(asking.stack) + 1
    halves = range(0, depths // 2, 2), range(depths // 2 // 2 * 2, depths - 1, 2)
    for start in range(0, len(sums), batch):
        tail = asking.tail(sums[start : start + batch])
        state, logits = tail.enter(), []
        for depth in range(depths):
            logits.append(tail.last(state).float())
            state = tail.run(state, slice(depth, depth + 1)) if depth < depths - 1 else state
        log_p_DBV = torch.stack(logits).log_softmax(-1)
        final_BV = log_p_DBV[-1]
        dola = [contrast(final_BV, log_p_DBV[list(half)])[0].argmax(-1) for half in halves]
        rules = [torch.tensor([rule.draw(row_V, generator) for row_V in final_BV]) for rule in RULES]
        samples_BS = torch.multinomial((final_BV / 0.7).softmax(-1), 10, replacement=True, generator=generator)
        parts.append([
            log_p_DBV[..., asking.digits_K].argmax(-1).T, asking.answer(torch.stack(dola, 1)),
            asking.answer(torch.stack(rules, 1)), asking.answer(samples_BS), final_BV.amax(-1).exp(),
        ])
    return Readings(*(torch.cat(column) for column in zip(*parts, strict=True)))
