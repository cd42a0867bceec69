"""How far from final the prediction at a layer's input is once an affine map has translated it: KL(p_L || p_l).

p_l is the softmax of final norm and head on h_l + A_l h_l + b_l, with h_l the residual stream that enters layer l, and
A_l, b_l fitted so that the result is what leaves the last layer, h_L. Source: the tuned lens (Belrose et al. 2023,
arXiv 2303.08112). This is the closed-form variant: there translators learn the divergence itself by gradient descent,
here they solve the least squares of h_L - h_l with a ridge, which pulls them towards the plain lens. So long states
count for more, and the divergence is not the smallest that an affine map can reach.

Columns: the divergence; `logit-lens`, the same without the map; `settled`, the share of positions whose likeliest token
at this layer's input and at every later one is the model's own. Of every row the tokens of even place fit, without the
first, whose length in language models swamps the rest; of those of odd place a sample is scored. Give several times the
width in tokens. Cost: two forward passes, width^2 for every token, and the head twice at `tokens` positions of every
row at every layer.

Shapes: L layers, N tokens, P scored positions, C hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from layerwise.errors import BadData, BadModel, BadOption
from layerwise.measure.base import Walk
from layerwise.measure.ending import CHUNK
from layerwise.measure.inputs import Input, Inputs
from layerwise.measure.linear_map import ridged, with_one
from layerwise.measure.logit_lens_kl import divergence
from layerwise.measure.progress import Progress
from layerwise.measure.sample import real, sample
from layerwise.measure.scores import Column, Direction
from layerwise.measure.seen import Reading
from layerwise.stack.base import Stack, State

States = Sequence[State]
Places = Sequence[Tensor]


@dataclass(frozen=True)
class TunedLens(Walk):
    """Divergence of translated early predictions from the model's own, at `tokens` positions of every row."""

    ridge: float = 1e-3
    tokens: int = 32

    name: ClassVar[str] = "tuned-lens"
    unit: ClassVar[str] = "nats"
    important: ClassVar[Direction] = "high"
    about: ClassVar[str] = "how far from final the best linear reading of what enters the layer is (closed form)"
    slow: ClassVar[bool] = True

    @property
    def parts(self) -> Mapping[str, str]:
        return {"": self.unit, "logit-lens": self.unit, "settled": "share"}

    def walk(self, stack: Stack, inputs: Inputs, seed: int, progress: Progress) -> tuple[Column, ...]:
        if not (self.ridge > 0 and self.tokens > 0):
            raise BadOption(f"ridge={self.ridge}, tokens={self.tokens} for {self.name}", expected="both above zero",
                            do="take the defaults")
        items = list(inputs)
        fitted, scored = zip(*(self._places(item, seed) for item in items), strict=True)
        if not all(sum(map(len, places)) for places in (fitted, scored)):
            raise BadData("texts of one or two tokens", expected="at least three tokens in a row",
                          do="give longer texts")
        last = [item.start(stack) for item in items]
        for layer in range(len(stack)):
            last = _advanced(stack, last, layer, progress)
        if not all(bool(state.hidden.isfinite().all()) for state in last):
            raise BadModel(f"the last states of {stack.name} are NaN or infinite", expected="finite activations",
                           do="check the weights, or compute in float32")
        states = [item.start(stack) for item in items]
        plain, tuned = [], []
        for layer in range(len(stack)):
            plain.append(_rows(states, scored))
            tuned.append(translated(plain[-1], translator(states, last, fitted, self.ridge)))
            states = _advanced(stack, states, layer, progress)
        return self._columns(stack, last[0], plain, tuned, _rows(last, scored))

    def _places(self, item: Input, seed: int) -> tuple[Tensor, Tensor]:
        """The positions of a batch that fit and those that are scored, as indices into the flattened [B, T]."""
        assert item.tokens_BT is not None
        real_BT = real(item.tokens_BT, item.mask_BT)
        place_BT = real_BT.cumsum(1) - 1
        even_BT, odd_BT = (real_BT & (place_BT > 0) & (place_BT % 2 == rest) for rest in (0, 1))
        return even_BT.flatten().nonzero()[:, 0], sample(item.tokens_BT, odd_BT, lambda length: self.tokens, seed)

    def _columns(self, stack: Stack, end: State, plain: Sequence[Tensor], tuned: Sequence[Tensor],
                 final_PC: Tensor) -> tuple[Column, ...]:
        """Read all layers through the head, some positions at a time."""
        sums = {"": torch.zeros(len(stack), dtype=torch.float64), "logit-lens": torch.zeros(len(stack)).double()}
        same: list[Tensor] = []
        for place_P in torch.arange(len(final_PC)).split(max(1, CHUNK // stack.spec.vocabulary)):

            def read(rows_PC: Tensor, place_P: Tensor = place_P) -> Reading:
                rows_1PC = rows_PC[place_P].to(end.hidden)[None]
                return Reading(stack.finish(end.moved(rows_1PC, len(stack)))[0])

            own = read(final_PC)
            agrees = []
            for layer in range(len(stack)):
                reading = read(tuned[layer])
                agrees.append((reading.top(1) == own.top(1))[:, 0])
                sums[""][layer] += divergence(own, reading).sum().cpu()
                sums["logit-lens"][layer] += divergence(own, read(plain[layer])).sum().cpu()
            same.append(torch.stack(agrees).cpu())
        values = {part: total_L / len(final_PC) for part, total_L in sums.items()}
        values["settled"] = settled(torch.cat(same, 1)).double().mean(1)
        columns = {part: self.column(part, value_L.tolist()) for part, value_L in values.items()}
        return (columns[""], replace(columns["logit-lens"], important=None, about="the same without the affine map"),
                replace(columns["settled"], important=None,
                        about="share of tokens whose likeliest next token no longer changes from here on"))


def translator(states: States, last: States, places: Places, ridge: float) -> Tensor:
    """A and b stacked, float64 [C + 1, C]: (h 1) times it is nearest to h_L - h at `places` of all batches."""
    gram_CC, cross_CC = torch.zeros(()), torch.zeros(())
    for state, end, place_N in zip(states, last, places, strict=True):
        h_NC, final_NC = (_rows([one], [place_N]).double() for one in (state, end))
        x_NC = with_one(h_NC)
        gram_CC, cross_CC = gram_CC.to(x_NC) + x_NC.T @ x_NC, cross_CC.to(x_NC) + x_NC.T @ (final_NC - h_NC)
    return torch.cholesky_solve(cross_CC, ridged(gram_CC, ridge))


def translated(h_PC: Tensor, map_CC: Tensor) -> Tensor:
    """h + A h + b, float32 [P, C]."""
    return (h_PC.double() + with_one(h_PC) @ map_CC).float()


def settled(same_LP: Tensor) -> Tensor:
    """True where `same_LP` is true from that layer to the last, bool [L, P]."""
    return same_LP.flip(0).cummin(0).values.flip(0)


def _rows(states: States, places: Places) -> Tensor:
    """The states at `places` of all batches under one another, float32 [P, C]."""
    return torch.cat([state.hidden.flatten(0, 1)[place_P.to(state.hidden.device)].float()
                      for state, place_P in zip(states, places, strict=True)])


def _advanced(stack: Stack, states: States, layer: int, progress: Progress) -> list[State]:
    """All batches past one layer."""
    moved = []
    for state in states:
        moved.append(stack.run(state, slice(layer, layer + 1)))
        progress.step()
    return moved
