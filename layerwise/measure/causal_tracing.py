"""Causal tracing: which state, put back into a run whose subject is noise, brings the answer back.

    p      chance of the answer in the clean run
    p*     the same with Gaussian noise on the subject's embeddings, mean over draws
    p_r    noise as before, but the clean states of one site at token t in a window of layers are put back
    share  max(0, p_r - p*) / |p - p*|

Sources: Meng et al. 2022 (ROME); the share as in arXiv 2301.04213. All draws and tokens run in one batch, and
the layers before a window once. Cost: draws x tokens x layers, times half of a forward.

Shapes: D draws, T tokens of the prompt, R restored tokens, L layers, C hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.data.prompts import Located
from layerwise.stack.base import Site, Stack, State
from layerwise.stack.changes import at, put

SMALLEST = 1e-6


@dataclass(frozen=True)
class Trace:
    """`clean` and `noised` are p and p*; `restored_RL` is p_r by token (`tokens`) and centre (`layers`)."""

    clean: float
    noised: float
    restored_RL: Tensor
    tokens: tuple[int, ...]
    layers: tuple[int, ...]

    @property
    def share_RL(self) -> Tensor:
        """Share of the lost probability that comes back; zero where nothing does."""
        return (self.restored_RL - self.noised).clamp(min=0) / max(abs(self.clean - self.noised), SMALLEST)

    @property
    def by_layer_L(self) -> Tensor:
        """The best token's share at each layer."""
        return self.share_RL.amax(0)


@dataclass(frozen=True)
class Corruption:
    """Noise of `spread` times the deviation of the embedding's entries, `draws` times; `window` layers put back."""

    spread: float = 3.0
    draws: int = 10
    window: int = 5
    site: Site = "feed_forward"
    seed: int = 0


def embedding_deviation(stack: Stack, tokens_BT: Tensor) -> float:
    """Standard deviation of the entries of the embeddings of some tokens, such as all subjects."""
    return float(stack.start(tokens_BT).hidden.float().std())


@torch.inference_mode()
def causal_trace(stack: Stack, prompt: Located, answer: int, deviation: float, corruption: Corruption,
                 layers: Sequence[int] | None = None) -> Trace:
    """Trace one prompt. `deviation` is that of the embeddings (`embedding_deviation`), `layers` the centres.

    Restored are the tokens from the subject's first on: those before are never corrupted.
    """
    centres = tuple(range(len(stack)) if layers is None else layers)
    tokens_T = torch.tensor(prompt.tokens)
    tokens = tuple(range(prompt.first, len(tokens_T)))
    with stack.capture(corruption.site) as seen:
        clean = _chances(stack, stack.run(stack.start(tokens_T[None])), answer)
    noised = noised_state(stack, prompt, deviation, corruption)
    states = [noised]
    while states[-1].layer < len(stack):
        states.append(stack.run(states[-1], slice(states[-1].layer, states[-1].layer + 1)))
    restored_RL = torch.empty(len(tokens), len(centres))
    every = stack.start(tokens_T.expand(len(tokens) * corruption.draws, -1))
    places_BT = (torch.arange(len(tokens_T)) == torch.tensor(tokens)[:, None]).repeat_interleave(corruption.draws, 0)
    for column, centre in enumerate(centres):
        first = max(0, centre - corruption.window // 2)
        window = range(first, min(len(stack), centre - corruption.window // 2 + corruption.window))
        state = every.moved(states[first].hidden.repeat(len(tokens), 1, 1), first)
        with ExitStack() as context:
            for layer in window:
                change = at(places_BT, put(seen[layer, corruption.site]))
                context.enter_context(stack.edit(layer, corruption.site, change))
            chance_B = _chances(stack, stack.run(state), answer)
        restored_RL[:, column] = chance_B.view(len(tokens), corruption.draws).mean(1)
    return Trace(float(clean), float(_chances(stack, states[-1], answer).mean()), restored_RL, tokens, centres)


def noised_state(stack: Stack, prompt: Located, deviation: float, corruption: Corruption) -> State:
    """What enters layer 0 with noise on the subject, [D, T, C]; the same for the same seed."""
    generator = torch.Generator().manual_seed(corruption.seed)
    tokens_DT = torch.tensor(prompt.tokens).expand(corruption.draws, -1)
    state = stack.start(tokens_DT)
    noise = torch.randn(corruption.draws, prompt.last - prompt.first + 1, state.hidden.shape[-1],
                        generator=generator)
    hidden_DTC = state.hidden.clone()
    hidden_DTC[:, prompt.first : prompt.last + 1] += (corruption.spread * deviation * noise).to(hidden_DTC)
    return state.moved(hidden_DTC, 0)


def _chances(stack: Stack, state: State, answer: int) -> Tensor:
    logits_BV: Tensor = stack.finish(state.moved(state.hidden[:, -1:], state.layer))[:, -1]
    return logits_BV.float().softmax(-1)[:, answer]

