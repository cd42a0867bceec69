"""How far from final the prediction at a layer's input is once an affine map has translated it: KL(p_L || p_l).

p_l is the softmax of final norm and head on h_l + A_l h_l + b_l, with h_l the residual stream that enters layer l, and
A_l, b_l fitted so that the result is what leaves the last layer, h_L. Source: the tuned lens (Belrose et al. 2023,
arXiv 2303.08112). There translators learn the divergence itself by gradient descent; here they solve the least squares
of h_L - h_l with a ridge, which pulls them towards the plain lens. So long states count for more, and the divergence is
not the smallest that an affine map can reach: with `steps` they go on from there as in the paper (`learned_lens.py`).

Columns: the divergence; `logit-lens`, the same without the map; `settled`, the share of positions whose likeliest token
at this layer's input and at every later one is the model's own. Half of the rows fit the map that the other half is
scored with, and the other way round: tokens of one text are too much alike to judge what they have fitted. The first of
every row is left out, whose length in language models swamps the rest. Give several times the width in tokens: with
fewer, the map says less than the states hold. Cost: two forward passes, width^2 for every token, and the head twice at
`tokens` positions of every row at every layer; memory holds the states of all data at two depths.

Shapes: L layers, N tokens, P scored positions, C hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from layerwise.data.metrics import CHUNK
from layerwise.errors import BadData, BadModel, BadOption
from layerwise.measure.base import Walk
from layerwise.measure.inputs import Input, Inputs
from layerwise.measure.learned_lens import learned
from layerwise.measure.linear_map import ridged, with_one
from layerwise.measure.logit_lens_kl import divergence
from layerwise.measure.progress import Progress
from layerwise.measure.sample import real, row_keys, sample
from layerwise.measure.scores import Column, Direction
from layerwise.measure.seen import Reading
from layerwise.stack.base import Stack, State

States = Sequence[State]
Places = Sequence[Tensor]


@dataclass(frozen=True)
class TunedLens(Walk):
    """Divergence of translated early predictions from the model's own, at `tokens` positions of every row."""

    ridge: float = 1e-2
    tokens: int = 32
    steps: int = 0

    name: ClassVar[str] = "tuned-lens"
    unit: ClassVar[str] = "nats"
    important: ClassVar[Direction] = "high"
    about: ClassVar[str] = "how far from final a linear reading of what enters the layer is, learned on other text"
    slow: ClassVar[bool] = True

    @property
    def parts(self) -> Mapping[str, str]:
        return {"": self.unit, "logit-lens": self.unit, "settled": "share"}

    def check(self, inputs: Inputs) -> None:
        if not (self.ridge > 0 and self.tokens > 0 and self.steps >= 0):
            raise BadOption(f"ridge={self.ridge}, tokens={self.tokens}, steps={self.steps} for {self.name}",
                            expected="ridge and tokens above zero, steps from zero", do="take the defaults")
        items = list(inputs)
        if not all(sum(map(len, self._places(items, half, 0)[0])) for half in _halves(items)):
            raise BadData("texts of one token, or one text only", expected="two different rows of several tokens",
                          do="give more or longer texts")

    def walk(self, stack: Stack, inputs: Inputs, seed: int, progress: Progress) -> tuple[Column, ...]:
        items = list(inputs)
        halves = [self._places(items, half, seed) for half in _halves(items)]
        last = [item.start(stack) for item in items]
        for layer in range(len(stack)):
            last = _advanced(stack, last, layer, progress)
        if not all(bool(state.hidden.isfinite().all()) for state in last):
            raise BadModel(f"the last states of {stack.name} are NaN or infinite", expected="finite activations",
                           do="check the weights, or compute in float32")
        states = [item.start(stack) for item in items]
        orders = [_order(items, fitted) for fitted, _ in halves]
        plain, tuned = [], []
        for layer in range(len(stack)):
            maps = [self._map(stack, states, last, fitted, order_N, seed)
                    for (fitted, _), order_N in zip(halves, orders, strict=True)]
            read = [_rows(states, scored) for _, scored in halves]
            plain.append(torch.cat(read))
            tuned.append(torch.cat([translated(*pair) for pair in zip(read, maps[::-1], strict=True)]))
            states = _advanced(stack, states, layer, progress)
        return self._columns(stack, last[0], plain, tuned, torch.cat([_rows(last, scored) for _, scored in halves]))

    def _map(self, stack: Stack, states: States, last: States, fitted: Places, order_N: Tensor, seed: int) -> Tensor:
        """The translator from `states`, learned at the positions in `fitted`."""
        map_CC = translator(states, last, fitted, self.ridge)
        if not self.steps:
            return map_CC
        h_NC, final_NC = (_rows(some, fitted)[order_N.to(map_CC.device)] for some in (states, last))
        rows = max(1, CHUNK // stack.spec.vocabulary)
        return learned(lambda rows_PC: _reading(stack, last[0], rows_PC), h_NC, final_NC, map_CC, steps=self.steps,
                       rows=rows, ridge=self.ridge, seed=seed)

    def _places(self, items: Sequence[Input], half: Sequence[Tensor], seed: int) -> tuple[Places, Places]:
        """Of the rows of one half (bool [B] by batch) all positions but each first, and the sample that is scored."""
        fitted, scored = [], []
        for item, half_B in zip(items, half, strict=True):
            assert item.tokens_BT is not None
            real_BT = real(item.tokens_BT, item.mask_BT)
            later_BT = real_BT & (real_BT.cumsum(1) > 1) & half_B[:, None].to(real_BT.device)
            fitted.append(later_BT.flatten().nonzero()[:, 0])
            scored.append(sample(item.tokens_BT, later_BT, lambda length: self.tokens, seed))
        return fitted, scored

    def _columns(self, stack: Stack, end: State, plain: Sequence[Tensor], tuned: Sequence[Tensor],
                 final_PC: Tensor) -> tuple[Column, ...]:
        """Read all layers through the head, some positions at a time."""
        sums = {"": torch.zeros(len(stack), dtype=torch.float64), "logit-lens": torch.zeros(len(stack)).double()}
        same: list[Tensor] = []
        for place_P in torch.arange(len(final_PC)).split(max(1, CHUNK // stack.spec.vocabulary)):
            own = _reading(stack, end, final_PC[place_P])
            agrees = []
            for layer in range(len(stack)):
                reading, bare = (_reading(stack, end, rows[layer][place_P]) for rows in (tuned, plain))
                agrees.append((reading.top(1) == own.top(1))[:, 0])
                sums[""][layer] += divergence(own, reading).sum().cpu()
                sums["logit-lens"][layer] += divergence(own, bare).sum().cpu()
            same.append(torch.stack(agrees).cpu())
        values = {part: total_L / len(final_PC) for part, total_L in sums.items()}
        values["settled"] = settled(torch.cat(same, 1)).double().mean(1)
        columns = {part: self.column(part, value_L.tolist()) for part, value_L in values.items()}
        return (columns[""], replace(columns["logit-lens"], important=None, about="the same without the affine map"),
                replace(columns["settled"], important=None,
                        about="share of tokens whose likeliest next token no longer changes from here on"))


def _halves(items: Sequence[Input]) -> tuple[list[Tensor], list[Tensor]]:
    """Every other row in the order of their hashes, and the rest, bool [B] by batch; equal rows stay together."""
    keys = [row_keys(item.tokens_BT, real(item.tokens_BT, item.mask_BT)) for item in items
            if item.tokens_BT is not None]
    place = {key: index for index, key in enumerate(sorted({key for batch in keys for key in batch}))}
    one = [torch.tensor([place[key] % 2 == 0 for key in batch]) for batch in keys]
    return one, [~half_B for half_B in one]


def _order(items: Sequence[Input], places: Places) -> Tensor:
    """Sorts the positions in `places` by the hashes of their rows, so that batches and their order do not matter."""
    row_hashes: list[bytes] = []
    for item, place_N in zip(items, places, strict=True):
        assert item.tokens_BT is not None
        keys = row_keys(item.tokens_BT, real(item.tokens_BT, item.mask_BT))
        row_hashes += [keys[place // item.tokens_BT.shape[1]] for place in place_N.tolist()]
    return torch.tensor(sorted(range(len(row_hashes)), key=row_hashes.__getitem__))


def _reading(stack: Stack, end: State, rows_PC: Tensor) -> Reading:
    """What the model would say if these were the states that leave its last layer."""
    return Reading(stack.finish(end.moved(rows_PC.to(end.hidden)[None], len(stack)))[0])


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
