"""Learning from the original: its predictions, and the hidden states that leave its layers.

    loss = logits * KL(original || student) + hidden * distance of paired states + tokens * next-token loss

KL at temperature 1, mean over positions, nats. Every kept layer may be paired with the layer it was; the distance of
two states is the squared error divided by the squared norm of the original's, token by token, since a few tokens with
huge states would rule a plain mean. Which pairs hardly matters, so a few evenly spread ones and those beside what is
gone are taken. What the original says about a block is worked out once and kept, if there is room.
Sources: Hinton et al. 2015 (arXiv 1503.02531), KL of softened predictions; layer pairs of Yu et al. 2025
(arXiv 2502.04499), who find that any pairing does about as well and none does worse; normalised states from
Zhang et al., LAPTOP-Diff, 2024 (arXiv 2404.11098).

Shapes: B rows, T tokens, C hidden width, V vocabulary, P positions (rows and tokens flattened).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.data.batch import slices
from layerwise.errors import BadOption
from layerwise.stack.base import State
from layerwise.stack.decoder import DecoderStack

SPREAD = 4
"""Evenly spread layers that are paired, besides those beside a cut."""

CHUNK = 1 << 24
"""Logits of each model that are held in float32 at once."""

MEMORY = 1 << 30
"""Bytes of what the original said that are kept at most."""


@dataclass(frozen=True)
class Weights:
    """How much each part of the loss counts; `hidden` is per pair's mean, a pure number; the others are nats."""

    logits: float = 1.0
    hidden: float = 1.0
    tokens: float = 0.0


@dataclass(frozen=True)
class Targets:
    """What the original has to say about some blocks: what enters its final norm, and its paired states, [B, T, C]."""

    final_BTC: Tensor
    states: tuple[Tensor, ...]


class Teacher:
    """The original, asked about blocks by their index in `tokens_NT`; answers are kept up to `memory` bytes.

    `kept` is the layer of the original that each layer of the student was; `pairs` are the student's layers whose
    output is compared. Raises BadOption where the two cannot be paired.
    """

    def __init__(self, stack: DecoderStack, tokens_NT: Tensor, kept: Sequence[int], *,
                 pairs: Sequence[int] | None = None, memory: int = MEMORY) -> None:
        if list(kept) != sorted(set(kept)) or not all(0 <= layer < len(stack) for layer in kept):
            raise BadOption(f"layers {list(kept)} of an original of {len(stack)}",
                            expected="one layer of the original for each of the student's, in order",
                            do="give the layers that were kept")
        self.stack, self.tokens_NT, self.kept = stack, tokens_NT, list(kept)
        self.pairs = paired(len(stack), kept) if pairs is None else list(pairs)
        self._answers = Store(self._ask, memory)

    def __call__(self, rows: Sequence[int]) -> Targets:
        """What the original says about blocks `rows`, in its own dtype."""
        final_BTC, *states = self._answers(rows)
        return Targets(final_BTC, tuple(states))

    def _ask(self, rows: list[int]) -> list[Tensor]:
        state = self.stack.start(self.tokens_NT[rows])
        states = []
        for pair in self.pairs:
            state = self.stack.run(state, slice(None, self.kept[pair] + 1))
            states.append(state.hidden)
        return [self.stack.run(state).hidden, *states]


class Store:
    """Tensors of a block by its index, worked out by `ask` (rows to tensors [B, ...]) the first time.

    They are kept up to `memory` bytes; what finds no room is worked out again every time.
    """

    def __init__(self, ask: Callable[[list[int]], list[Tensor]], memory: int) -> None:
        self._ask, self._room = ask, memory
        self._found: dict[int, tuple[Tensor, ...]] = {}

    @torch.no_grad()
    def __call__(self, rows: Sequence[int]) -> list[Tensor]:
        """The tensors of `rows`, each [B, ...]."""
        missing = [row for row in dict.fromkeys(rows) if row not in self._found]
        new = dict(zip(missing, zip(*self._ask(missing), strict=True), strict=True)) if missing else {}
        found = [self._found.get(row) or new[row] for row in rows]
        for row, parts in new.items():
            size = sum(part.nbytes for part in parts)
            if size <= self._room:
                self._found[row], self._room = tuple(part.clone() for part in parts), self._room - size
        return [torch.stack(parts) for parts in zip(*found, strict=True)]


def paired(layers: int, kept: Sequence[int], spread: int = SPREAD) -> list[int]:
    """Which of the student's layers to pair: the first after every gap in `kept`, and `spread` evenly spaced ones.

    The student's last layer is left out where it is the original's: predictions speak for it.
    """
    count = len(kept)
    beside = [index for index in range(1, count) if kept[index] != kept[index - 1] + 1]
    even = [round((step + 1) * count / (spread + 1)) - 1 for step in range(spread)]
    last = count - 1 if count and kept[-1] == layers - 1 else count
    return sorted({index for index in (*beside, *even) if 0 <= index < last})


def distillation(teacher: Teacher, weights: Weights, frozen: int = 0) -> Callable[[DecoderStack, Tensor], Tensor]:
    """The loss of a student on blocks given by their indices, int64 [B, 1].

    What leaves the first `frozen` layers, of which nothing learns, is worked out once a block and kept like answers.
    """
    pairs = [pair for pair in teacher.pairs if pair >= frozen] if weights.hidden else []
    prefix: Store | None = None

    def started(student: DecoderStack, rows: list[int]) -> State:
        nonlocal prefix
        state = student.start(teacher.tokens_NT[rows])
        if not frozen:
            return state
        prefix = prefix or Store(lambda rows: [student.run(student.start(teacher.tokens_NT[rows]),
                                                           slice(None, frozen)).hidden], MEMORY)
        return state.moved(prefix(rows)[0], frozen)

    def loss(student: DecoderStack, rows_B1: Tensor) -> Tensor:
        rows: list[int] = rows_B1[:, 0].tolist()
        targets, state, distances = teacher(rows), started(student, rows), []
        wanted = dict(zip(teacher.pairs, targets.states, strict=True))
        for pair in pairs:
            state = student.run(state, slice(None, pair + 1))
            distances.append(distance(state.hidden, wanted[pair]))
        final_BTC = student.run(state).hidden
        total = predictions_loss(student, final_BTC, teacher.stack, targets.final_BTC, teacher.tokens_NT[rows], weights)
        return total + weights.hidden * torch.stack(distances).mean() if distances else total

    return loss


def frozen_layers(student: DecoderStack) -> int:
    """How many of the first layers have nothing that learns, and leave nothing to later layers but their states."""
    decoder = student.decoder
    first = [decoder.embedding, *([decoder.positions] if decoder.positions else [])]
    if student.spec.sources or any(parameter.requires_grad for module in first for parameter in module.parameters()):
        return 0
    learns = [any(parameter.requires_grad for parameter in student.block(layer).parameters())
              for layer in range(len(student))]
    return learns.index(True) if True in learns else len(learns)


def distance(states_BTC: Tensor, target_BTC: Tensor) -> Tensor:
    """Squared error over the target's squared norm, mean over tokens: 0 for equal states, 1 for zeros."""
    target_BTC = target_BTC.float()
    error_BT = (states_BTC.float() - target_BTC).square().sum(-1)
    return (error_BT / target_BTC.square().sum(-1).clamp_min(1e-12)).mean()


def predictions_loss(student: DecoderStack, final_BTC: Tensor, original: DecoderStack, target_BTC: Tensor,
                     tokens_BT: Tensor, weights: Weights) -> Tensor:
    """The parts of the loss that need logits, from what enters both final norms; logits exist chunk by chunk."""
    next_P = F.pad(tokens_BT[:, 1:], (0, 1), value=-1).flatten().to(final_BTC.device)
    target_PC = target_BTC.flatten(0, 1)
    predicted = max(1, int((next_P >= 0).sum()))

    def chunk(final_PC: Tensor, part: slice) -> Tensor:
        log_PV = student.decoder.logits(final_PC).float().log_softmax(-1)
        with torch.no_grad():
            wanted_PV = original.decoder.logits(target_PC[part]).float().log_softmax(-1)
        kl = F.kl_div(log_PV, wanted_PV, reduction="sum", log_target=True)
        total = weights.logits * kl / len(target_PC)
        if weights.tokens:
            nll = F.nll_loss(log_PV, next_P[part], ignore_index=-1, reduction="sum")
            total = total + weights.tokens * nll / predicted
        return total

    ends = [student.decoder.norm, student.decoder.head or student.decoder.embedding]
    parameters = [parameter for module in ends if isinstance(module, nn.Module) for parameter in module.parameters()
                  if parameter.requires_grad]
    size = max(1, CHUNK // student.spec.vocabulary)
    return in_chunks(chunk, final_BTC.flatten(0, 1), parameters, size)


def in_chunks(loss: Callable[[Tensor, slice], Tensor], x_PC: Tensor, parameters: Sequence[Tensor], size: int) -> Tensor:
    """The sum of `loss(x_PC[part], part)` over parts of `size` positions, one part's graph in memory at a time.

    `parameters` are all that `loss` depends on besides `x_PC` and that want a gradient.
    """
    if not torch.is_grad_enabled():
        return torch.stack([loss(x_PC[part], part) for part in slices(len(x_PC), size)]).sum()
    total: Tensor = _InChunks.apply(loss, size, x_PC, *parameters)  # type: ignore[no-untyped-call]
    return total


class _InChunks(torch.autograd.Function):
    """Gradients are worked out in the forward pass, part by part, and only they are kept."""

    @staticmethod
    def forward(ctx: Any, loss: Callable[[Tensor, slice], Tensor], size: int, x_PC: Tensor,
                *parameters: Tensor) -> Tensor:
        x_grad_PC, sums = torch.zeros_like(x_PC), [torch.zeros_like(parameter) for parameter in parameters]
        total = x_PC.new_zeros((), dtype=torch.float32)
        for part in slices(len(x_PC), size):
            with torch.enable_grad():
                here_PC = x_PC[part].detach().requires_grad_()
                value = loss(here_PC, part)
                found = torch.autograd.grad(value, [here_PC, *parameters])
            total += value.detach()
            x_grad_PC[part] = found[0]
            for sum_, gradient in zip(sums, found[1:], strict=True):
                sum_ += gradient
        ctx.save_for_backward(x_grad_PC, *sums)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return None, None, *(gradients[0] * saved for saved in ctx.saved_tensors)
