"""Heal: a short training that recovers what a transform cost, on a dropped, narrowed, low-rank or packed stack."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.errors import BadData
from layerwise.measure.identity import identity
from layerwise.nets.dense import SLOW
from layerwise.stack.decoder import DecoderStack
from layerwise.train.bridge import bridged
from layerwise.train.checkpoint import Checkpoint, digest
from layerwise.train.distill import Teacher, Weights, distillation, frozen_layers
from layerwise.train.duration import Duration
from layerwise.train.healing import Healing
from layerwise.train.loop import AfterStep, Best, Clock, Recipe, train
from layerwise.train.methods import Layers, Lora, Method, Partial, Scales, prepared, stored

__all__ = ["Healed", "Healing", "Layers", "Lora", "Partial", "Recipe", "Scales", "distil", "heal", "next_token_loss"]

Loss = Callable[[DecoderStack, Tensor], Tensor]

FAST_RATE, SCALE_RATE = 3e-4, 3e-3
"""Learning rates where dense weights are trained, and where only scales, norms and biases are."""

BATCH = 2
"""Blocks in one step."""

BRIDGED, SHARE = 32, 0.4
"""Blocks on which gaps are bridged, and the part of the time that this may take."""


@dataclass(frozen=True)
class Healed:
    """The healed stack, what it took, and the loss of every step."""

    stack: DecoderStack
    healing: Healing
    losses: list[float]


def next_token_loss(stack: DecoderStack, tokens_BT: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, nats."""
    logits_BTV = stack(tokens_BT)
    return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), tokens_BT[:, 1:].flatten())


def heal(
    stack: DecoderStack,
    tokens_NT: Tensor,
    method: Method,
    recipe: Recipe | None = None,
    *,
    loss: Loss = next_token_loss,
) -> tuple[DecoderStack, list[float]]:
    """Train a float32 copy of `stack` on blocks of tokens; returns it in the dtype of `stack`, and the losses.

    The recipe's seed draws batches, adapters and dropout; the global generator is left as it was. Raises BadOption
    for a method that does not suit the stack and MissingExtra where PEFT is needed.
    """
    recipe = recipe or Recipe()
    with _seeded(stack, recipe.seed):
        student = prepared(stack, method)
        losses = train(_trainable(student), lambda tokens_BT: loss(student, tokens_BT), tokens_NT, recipe)
    return stored(student, stack), losses


def distil(
    stack: DecoderStack,
    original: DecoderStack,
    tokens_NT: Tensor,
    held_NT: Tensor,
    kept: Sequence[int],
    method: Method | None = None,
    recipe: Recipe | None = None,
    *,
    weights: Weights | None = None,
    folder: str | Path | None = None,
    after: Sequence[AfterStep] = (),
    bridge: bool = True,
) -> Healed:
    """Heal `stack` by learning from the `original` it was made of, and never make it worse.

    `kept` says which layer of the original each layer of `stack` was. Training reads `tokens_NT`; the best state, that
    before the first step among them, is chosen on `held_NT`, blocks of the same kind that training does not read, and
    where even that comes no nearer to the original than `stack` was, `stack` itself is returned. Half-precision stacks
    are computed in half precision where the processor has it, with weights and sums in float32. With `folder`, a
    killed healing goes on from its last state; in seconds, all the time that `distil` takes counts. What is stored
    takes the bytes it took before. Where layers are gone and all others are trained, `bridge` first makes up for them
    by least squares (see `bridge`).

    Raises BadData without blocks to train or judge on, BadOption as `heal` and for layers that do not pair.
    """
    if not len(tokens_NT) or not len(held_NT):
        raise BadData(f"{len(tokens_NT)} blocks to heal on and {len(held_NT)} to judge it by",
                      expected="at least one of each", do="give more text")
    method, weights = method or Layers(), weights or Weights()
    recipe = recipe or defaults(stack, method)
    clock = Clock(recipe)
    bridging = bridge and method == Layers()
    name = digest(identity(stack), tokens_NT, held_NT, list(kept), method, recipe, weights, bridging)
    checkpoint = Checkpoint(folder, name) if folder else None
    lesson, held = Teacher(original, tokens_NT, kept), Teacher(original, held_NT, kept)
    began = time.monotonic()
    before = _judged(stack, held)
    clock.reserve = 2 * (time.monotonic() - began)
    start, nearest, solved = stack, before, list[int]()
    if bridging:
        blocks = BRIDGED
        if recipe.seconds is not None and clock.reserve > 0:
            blocks = min(blocks, int(SHARE * recipe.seconds * len(held_NT) / clock.reserve))
        over, solved = bridged(stack, original, tokens_NT[:blocks], kept)
        if solved and (value := _judged(over, held)) < before:
            start, nearest = over, value
        else:
            solved = []
    with _seeded(stack, recipe.seed):
        student = prepared(start, method)
        step, parameters = distillation(lesson, weights, frozen_layers(student)), _trainable(student)

        def loss(rows_B1: Tensor) -> Tensor:
            with _half(stack):
                return step(student, rows_B1)

        best = Best(lambda: _judged(student, held, stack), value=nearest,
                    found=[parameter.detach().clone() for parameter in parameters])
        rows_N1 = torch.arange(len(tokens_NT))[:, None]
        losses = train(parameters, loss, rows_N1, recipe, after=after, best=best, checkpoint=checkpoint, clock=clock)
    healed = stored(student, stack)
    result = _judged(healed, held)
    helped = result < before
    tokens, trained = len(losses) * recipe.batch * tokens_NT.shape[1], sum(part.numel() for part in parameters)
    healing = Healing(len(losses), tokens, clock.seconds, before, result, helped, trained, len(solved))
    return Healed(healed if helped else stack, healing, losses)


def defaults(stack: DecoderStack, method: Method, duration: Duration | None = None, seed: int = 0) -> Recipe:
    """A recipe whose learning rate suits what the method trains; 100 steps where no duration is given."""
    duration = duration or Duration(steps=100)
    packed = all(set(row.matrices(stack.spec.hidden)) <= set(row.formats) for row in stack.spec.rows)
    rate = SCALE_RATE if packed or isinstance(method, Scales) else FAST_RATE
    return Recipe(duration.steps or 0, BATCH, rate, warmup=10, seed=seed, seconds=duration.seconds)


@torch.no_grad()
def _judged(student: DecoderStack, held: Teacher, like: DecoderStack | None = None) -> float:
    """KL from the original on held-out blocks, nats per token; in half precision where `like` (or itself) is."""
    step, values = distillation(held, Weights(hidden=0.0)), []
    training = student.decoder.training
    student.decoder.eval()
    for row in range(len(held.tokens_NT)):
        with _half(like or student):
            values.append(float(step(student, torch.tensor([[row]]))))
    student.decoder.train(training)
    return sum(values) / len(values)


def _half(stack: DecoderStack) -> torch.autocast:
    """Half precision where the stack is in it, unless this processor is slow in it."""
    dtype = stack.dtype if stack.dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
    slow = stack.device.type == "cpu" and dtype in SLOW
    return torch.autocast(stack.device.type, dtype=dtype, enabled=stack.dtype != torch.float32 and not slow)


def _trainable(student: DecoderStack) -> list[torch.nn.Parameter]:
    return [parameter for parameter in student.decoder.parameters() if parameter.requires_grad]


@contextmanager
def _seeded(stack: DecoderStack, seed: int) -> Iterator[None]:
    """The global generators seeded inside, and as they were afterwards."""
    with torch.random.fork_rng([stack.device] if stack.device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
