"""One plain training loop: AdamW or another optimizer, warm-up and linear decay, clipping, seeded order.

It ends after a number of steps, or after a time: then rates follow the clock. It keeps the best of what it passed
through, where it is told how to judge, and goes on from a checkpoint after a kill.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.errors import BadData, BadOption
from layerwise.train.checkpoint import Checkpoint, Saved


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to train. `batch` counts blocks of text in one step; `seconds` replace `steps`."""

    steps: int = 100
    batch: int = 4
    learning_rate: float = 1e-4
    warmup: int = 10
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0
    seconds: float | None = None


Optimizer = Callable[[Sequence[nn.Parameter], float], torch.optim.Optimizer]
"""Parameters and learning rate to an optimizer."""
AfterStep = Callable[[int], None]
"""A training-time instrument: called with the number of steps done, after each."""


class Clock:
    """How far a training is: steps done, seconds spent since `began` and, before a kill, `spent`."""

    def __init__(self, recipe: Recipe, reserve: float = 0.0) -> None:
        self.recipe, self.reserve = recipe, reserve
        self.steps, self.spent, self.began = 0, 0.0, time.monotonic()

    @property
    def seconds(self) -> float:
        return self.spent + time.monotonic() - self.began

    @property
    def progress(self) -> float:
        """From 0 to 1, and above where time ran out; `reserve` seconds are left for what comes after training."""
        if self.recipe.seconds is None:
            return self.steps / self.recipe.steps if self.recipe.steps else 1.0
        return self.seconds / max(self.recipe.seconds - self.reserve, 1e-9)

    @property
    def rate(self) -> float:
        """Share of the learning rate for the next step."""
        if self.steps < self.recipe.warmup:
            return (self.steps + 1) / self.recipe.warmup
        if self.recipe.seconds is not None:
            return max(0.0, 1.0 - self.progress)
        return max(0.0, (self.recipe.steps - self.steps) / max(1, self.recipe.steps - self.recipe.warmup))


@dataclass
class Best:
    """The parameters for which `judge` (lower is better) was lowest, looked at `looks` times over a training.

    `value` and `found` may be given: what there is before the first step then counts as well.
    """

    judge: Callable[[], float]
    looks: int = 4
    value: float = math.inf
    found: list[Tensor] = field(default_factory=list)
    looked: int = 0

    def look(self, parameters: Sequence[Tensor], progress: float) -> None:
        """Judge where another look is due."""
        if progress < (self.looked + 1) / self.looks and progress < 1:
            return
        self.looked = max(self.looked + 1, min(math.floor(progress * self.looks), self.looks))
        value = self.judge()
        if value < self.value:
            self.value, self.found = value, [parameter.detach().clone() for parameter in parameters]

    def restore(self, parameters: Sequence[Tensor]) -> None:
        """Put the best parameters back."""
        with torch.no_grad():
            for parameter, value in zip(parameters, self.found, strict=False):
                parameter.copy_(value)


def train(
    parameters: Sequence[nn.Parameter],
    loss: Callable[[Tensor], Tensor],
    tokens_NT: Tensor,
    recipe: Recipe,
    *,
    optimizer: Optimizer | None = None,
    after: Sequence[AfterStep] = (),
    best: Best | None = None,
    checkpoint: Checkpoint | None = None,
    clock: Clock | None = None,
) -> list[float]:
    """Minimise `loss(tokens_BT)` over `parameters`; returns the loss of every step, nats per token.

    What is trained on need not be text: `tokens_NT` may hold rows of any kind, such as indices into a set.
    `optimizer` takes the place of AdamW, and every callable in `after` is told the steps done. With `best`, the
    parameters end as the best ones it saw. With `checkpoint`, the state is saved now and then, and one that is there
    is taken up: in steps the result is the same to the bit, in time the time left is used. `clock` may have begun
    before.

    Raises BadData where there are fewer blocks than one batch, and BadOption where nothing can be trained
    or the loss stops being finite.
    """
    if len(tokens_NT) < recipe.batch:
        raise BadData(
            f"{len(tokens_NT)} blocks of text",
            expected=f"at least one batch of {recipe.batch}",
            do="give more text or a smaller batch",
        )
    if not parameters:
        raise BadOption("no parameters to train", expected="at least one", do="choose layers to train")
    chosen = (
        torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
        if optimizer is None
        else optimizer(parameters, recipe.learning_rate)
    )
    rates = [group["lr"] for group in chosen.param_groups]
    clock = clock or Clock(recipe)
    losses: list[float] = []
    saved = checkpoint.load() if checkpoint else None
    if saved:
        losses = _restore(saved, parameters, chosen, clock, best)
    batches = _batches(tokens_NT, recipe)
    for _ in range(clock.steps):
        next(batches)
    while clock.progress < 1:
        value = loss(next(batches))
        if not bool(torch.isfinite(value)):
            raise BadOption(
                f"a loss of {float(value.detach())} at step {len(losses)}",
                expected="a finite loss",
                do=f"lower the learning rate ({recipe.learning_rate})",
            )
        chosen.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, recipe.clip)
        for group, rate in zip(chosen.param_groups, rates, strict=True):
            group["lr"] = rate * clock.rate
        chosen.step()
        clock.steps += 1
        losses.append(float(value.detach()))
        for watch in after:
            watch(len(losses))
        if best:
            best.look(parameters, clock.progress)
        if checkpoint and checkpoint.due(clock.progress >= 1):
            checkpoint.save(_state(parameters, chosen, clock, best, losses))
    if best:
        best.restore(parameters)
    return losses


def _batches(tokens_NT: Tensor, recipe: Recipe) -> Iterator[Tensor]:
    """Batches without end: seeded permutations of the blocks, one after another."""
    generator = torch.Generator().manual_seed(recipe.seed)
    order: list[int] = []
    while True:
        if len(order) < recipe.batch:
            order += torch.randperm(len(tokens_NT), generator=generator).tolist()
        chosen, order = order[: recipe.batch], order[recipe.batch :]
        yield tokens_NT[chosen]


def _state(parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer, clock: Clock, best: Best | None,
           losses: list[float]) -> Saved:
    tensors = {f"parameter.{index}": parameter for index, parameter in enumerate(parameters)}
    values: dict[str, Any] = {"steps": clock.steps, "seconds": clock.seconds, "losses": losses, "optimizer": {}}
    for index, entry in optimizer.state_dict()["state"].items():
        for name, value in entry.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            else:
                values["optimizer"][f"{index}.{name}"] = value
    if best:
        values["best"] = {"value": best.value if best.found else None, "looked": best.looked}
        tensors |= {f"best.{index}": tensor for index, tensor in enumerate(best.found)}
    tensors["random"] = torch.random.get_rng_state()
    return Saved(tensors, values)


@torch.no_grad()
def _restore(saved: Saved, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer, clock: Clock,
             best: Best | None) -> list[float]:
    """Put everything back as it was when the state was saved; returns the losses until then."""
    values, tensors = saved.values, saved.tensors
    for index, parameter in enumerate(parameters):
        parameter.copy_(tensors[f"parameter.{index}"])
    state: dict[int, dict[str, Any]] = {}
    entries = {name.partition(".")[2]: tensor for name, tensor in tensors.items() if name.startswith("optimizer.")}
    for path, value in {**entries, **values["optimizer"]}.items():
        index_, _, name = path.partition(".")
        state.setdefault(int(index_), {})[name] = value.clone() if isinstance(value, Tensor) else value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    clock.steps, clock.spent = values["steps"], values["seconds"]
    if best and "best" in values:
        best.looked = values["best"]["looked"]
        if values["best"]["value"] is not None:
            best.value = values["best"]["value"]
            best.found = [tensors[f"best.{index}"].to(p.device).clone() for index, p in enumerate(parameters)]
    torch.random.set_rng_state(tensors["random"].clone())
    return list(values["losses"])
