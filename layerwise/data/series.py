"""Time series that need no download, by kind, and what is said about a window of one.

Shapes: N series or windows, T steps, F features.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from layerwise.errors import UnknownName

Draw = Callable[[int, int, torch.Generator], Tensor]


def series(kind: str, count: int, length: int, seed: int) -> Tensor:
    """`count` series of one kind, [N, T]; every series draws its own parameters. Raises UnknownName."""
    if kind not in KINDS:
        raise UnknownName("kind of series", kind, KINDS)
    return KINDS[kind](count, length, torch.Generator().manual_seed(seed))


def windows(series_NT: Tensor, context: int, horizon: int) -> tuple[Tensor, Tensor]:
    """The last context + horizon steps of each, scaled by the context's own mean and deviation."""
    cut_NT = series_NT[:, -(context + horizon) :]
    past_NT = cut_NT[:, :context]
    mean_N1, scale_N1 = past_NT.mean(1, keepdim=True), past_NT.std(1, keepdim=True).clamp(min=1e-4)
    scaled_NT = ((cut_NT - mean_N1) / scale_N1).clamp(-20, 20)
    return scaled_NT[:, :context], scaled_NT[:, context:]


def features(past_NT: Tensor) -> Tensor:
    """Shape, dependence, seasonality, trend and complexity of scaled windows, [N, F] in the order of FEATURES."""
    x = past_NT.double()
    x = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True).clamp(min=1e-9)
    steps = x[:, 1:] - x[:, :-1]
    power = torch.fft.rfft(x).abs().square()[:, 1:]
    share = power / power.sum(1, keepdim=True).clamp(min=1e-12)
    grid = torch.linspace(-1, 1, x.shape[1], dtype=torch.float64)
    slope = (x * grid).mean(1) / grid.square().mean()
    straight = x - slope[:, None] * grid
    lags = [(x[:, lag:] * x[:, :-lag]).mean(1) for lag in (1, 2, 4, 8, 16)]
    turns = ((steps[:, 1:] * steps[:, :-1]) < 0).double().mean(1)
    halves = x[:, x.shape[1] // 2 :].var(1) / x[:, : x.shape[1] // 2].var(1).clamp(min=1e-9)
    columns = [
        x.pow(3).mean(1), x.pow(4).mean(1), *lags, (steps[:, 1:] * steps[:, :-1]).mean(1), steps.std(1),
        steps.abs().amax(1), -(share * share.clamp(min=1e-12).log()).sum(1) / math.log(share.shape[1]),
        share.amax(1), share.argmax(1) / share.shape[1], slope, 1 - straight.var(1), turns, halves.log(),
        x[:, -8:].mean(1), (x.diff(n=2).std(1) / steps.std(1).clamp(min=1e-9)),
    ]
    return torch.stack([column.nan_to_num(0.0, 0.0, 0.0).clamp(-50, 50) for column in columns], 1)


FEATURES = ("skew", "tails", "lag 1", "lag 2", "lag 4", "lag 8", "lag 16", "lag 1 of steps", "step size",
            "largest step", "spectral entropy", "largest peak", "peak frequency", "slope", "trend share",
            "turning points", "change of variance", "last level", "roughness")


# kinds ------------------------------------------------------------------------------------------


def _uniform(low: float, high: float, count: int, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(count, 1, generator=generator)


def _noise(count: int, length: int, generator: torch.Generator) -> Tensor:
    return torch.randn(count, length, generator=generator)


def _seasonal(short: float, long: float, trend: float = 0.5, noise: float = 0.2, waves: int = 1) -> Draw:
    def draw(count: int, length: int, generator: torch.Generator) -> Tensor:
        time = torch.arange(length)[None]
        total = _uniform(-trend, trend, count, generator) * time / 16 + noise * _noise(count, length, generator)
        for _ in range(waves):
            period = _uniform(short, long, count, generator)
            total = total + torch.sin(2 * math.pi * (time / period + _uniform(0, 1, count, generator)))
        return total
    return draw


def _recursive(step: Callable[[list[Tensor], Tensor], Tensor], noise: float = 1.0) -> Draw:
    """x_t from the values before it and a shock, after 32 steps that are thrown away."""
    def draw(count: int, length: int, generator: torch.Generator) -> Tensor:
        shocks = noise * _noise(count, length + 32, generator)
        past = [0.1 * shock for shock in _noise(2, count, generator)]
        for shock in shocks.T:
            past.append(step(past, shock))
        return torch.stack(past[-length:], 1)
    return draw


def _walk(drift: float) -> Draw:
    def draw(count: int, length: int, generator: torch.Generator) -> Tensor:
        return (_noise(count, length, generator) + _uniform(-drift, drift, count, generator)).cumsum(1)
    return draw


def _logistic(rate: float) -> Draw:
    def draw(count: int, length: int, generator: torch.Generator) -> Tensor:
        value, found = _uniform(0.1, 0.9, count, generator)[:, 0], []
        for _ in range(length + 32):
            value = rate * value * (1 - value)
            found.append(value)
        return torch.stack(found[-length:], 1)
    return draw


def _pulses(count: int, length: int, generator: torch.Generator) -> Tensor:
    period, phase = _uniform(8, 20, count, generator), _uniform(0, 1, count, generator)
    place = (torch.arange(length)[None] / period + phase).frac()
    return torch.exp(-((place - 0.5) * 12).square()) + 0.05 * _noise(count, length, generator)


def _sawtooth(count: int, length: int, generator: torch.Generator) -> Tensor:
    period, phase = _uniform(6, 24, count, generator), _uniform(0, 1, count, generator)
    return (torch.arange(length)[None] / period + phase).frac() + 0.05 * _noise(count, length, generator)


def _modulated(count: int, length: int, generator: torch.Generator) -> Tensor:
    time = torch.arange(length)[None]
    slow, fast = _uniform(40, 90, count, generator), _uniform(4, 9, count, generator)
    return (1 + torch.sin(2 * math.pi * time / slow)) * torch.sin(2 * math.pi * time / fast) + 0.1 * _noise(
        count, length, generator)


def _switching(count: int, length: int, generator: torch.Generator) -> Tensor:
    flips = (torch.rand(count, length, generator=generator) < 0.05).cumsum(1) % 2
    return 2.0 * flips + 0.3 * _noise(count, length, generator)


def _bursts(count: int, length: int, generator: torch.Generator) -> Tensor:
    sizes = torch.rand(count, length, generator=generator)
    return (sizes - 0.8).clamp(min=0) * 5 + _seasonal(12, 14, 0, 0.05)(count, length, generator)


KINDS: dict[str, Draw] = {
    "seasonal": _seasonal(8, 32),
    "autoregressive": _recursive(lambda past, shock: 0.8 * past[-1] + shock),
    "chaotic": _logistic(3.9),
    "walk": _walk(0.2),
    "short season": _seasonal(3, 6, 0.1),
    "two seasons": _seasonal(5, 30, 0.2, 0.1, waves=2),
    "trend": _seasonal(200, 400, 2.0, 0.3),
    "oscillating": _recursive(lambda past, shock: 1.5 * past[-1] - 0.9 * past[-2] + shock),
    "threshold": _recursive(lambda past, shock: torch.where(past[-1] > 0, -0.8, 0.9) * past[-1] + shock, 0.5),
    "milder chaos": _logistic(3.7),
    "drift": _walk(1.0),
    "pulses": _pulses,
    "sawtooth": _sawtooth,
    "modulated": _modulated,
    "switching": _switching,
    "bursts": _bursts,
}
"""The first four are for training forecasters, the rest are held out."""
TRAINING = tuple(KINDS)[:4]
HELD_OUT = tuple(KINDS)[4:]
