"""TorchNTK: A Library for Calculation of Neural Tangent Kernels of PyTorch Models (arXiv 2205.12372)

Claims of the library paper: the kernel by automatic differentiation and, faster, in closed form for perceptrons; the
additive part of every layer; less memory one layer at a time; conditioning relates to the quality of the model.

From the official code: the closed form, the routes and the definition of conditioning. Run on the same perceptron
(20-50-50-1, 32 inputs), its parts of weights differ from ours by 5e-8. Difference found: its condition for bias parts
is never true, so its sum misses them, there 43 % of the kernel; the first check shows what that costs. Ours:
gradients by `torch.func`, linear layers by hooks in any network, drawn digits, the thresholds, and kernel ridge as
the stand-in for the network.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from functools import partial

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from layerwise.data.glyphs import glyphs
from layerwise.data.labelled import Labelled
from layerwise.measure import ntk
from layerwise.measure.live import peak_bytes
from layerwise.nets.classifiers import convnet, mlp
from layerwise.systems.base import Check, Size
from layerwise.train.classify import accuracy, fit, seeded
from layerwise.train.loop import Recipe

Route = Callable[[nn.Module, Tensor], ntk.Parts]


def run(size: Size, seed: int) -> list[Check]:
    """Routes compared in value, time and memory; the kernel of trained networks as a classifier."""
    data, test = _halves(glyphs(400 if size == "quick" else 1000, seed + 1, side=12)), _halves(
        glyphs(500, seed + 2, side=12))
    return [_agree(data, seed), _fast(data, size, seed), _small(data, size, seed), _stand_in(data, test, size, seed),
            _conditioned(data, test, size, seed)]


def _halves(data: Labelled) -> Labelled:
    """Digits below five against the others."""
    return Labelled(data.x_N, (data.labels_N >= 5).long(), 2, f"{data.name}, below five or not")


def _perceptron(seed: int, width: int = 100, depth: int = 2) -> nn.Sequential:
    net = seeded(lambda: mlp((144, *[width] * depth, 1)), seed)
    assert isinstance(net, nn.Sequential)
    return net


def _agree(data: Labelled, seed: int) -> Check:
    x_N, perceptron = data.x_N[:40].double(), _perceptron(seed).double()
    images = seeded(lambda: convnet((4, 8), 16, 12, classes=1), seed).double()
    routes: dict[str, tuple[nn.Module, ntk.Parts]] = {
        "explicit": (perceptron, ntk.explicit(perceptron, x_N)),
        "by hooks": (perceptron, ntk.by_hooks(perceptron, x_N)),
        "one by one": (perceptron, ntk.one_by_one(perceptron, x_N)),
        "together": (perceptron, ntk.together(perceptron, x_N)),
        "convolutions, one by one": (images, ntk.one_by_one(images, x_N)),
        "convolutions, together": (images, ntk.together(images, x_N)),
    }
    truth = {net: ntk.looped(net, x_N) for net in (perceptron, images)}
    by_part = {name: max(_apart(parts[key], truth[net][key]) for key in truth[net])
               for name, (net, parts) in routes.items()}
    whole = ntk.total(truth[perceptron])
    no_bias = ntk.total({name: part for name, part in truth[perceptron].items() if name.endswith("weight")})
    sums = {name: _apart(ntk.total(parts), ntk.total(truth[net])) for name, (net, parts) in routes.items()}
    return Check(
        name="all routes give the same parts",
        claim="every part and the sum differ from those of a plain loop by less than 1e-5, relative, in float64",
        measured={"largest difference of a part": {name: float(f"{value:.2g}") for name, value in by_part.items()},
                  "of the sum": {name: float(f"{value:.2g}") for name, value in sums.items()}},
        control={"sum without bias parts, as the official closed form": round(_apart(no_bias, whole), 4)},
        holds=max(*by_part.values(), *sums.values()) < 1e-5,
        why="Frobenius norm of the difference over that of the loop's; 40 digits, a perceptron 144-100-100-1 and two "
        "convolutions",
    )


def _apart(found_NN: Tensor, true_NN: Tensor) -> float:
    return float((found_NN - true_NN).detach().norm() / true_NN.detach().norm())


def _fast(data: Labelled, size: Size, seed: int) -> Check:
    net, counts = _perceptron(seed), (64,) if size == "quick" else (64, 256, 1000)
    routes: dict[str, Route] = {"by hooks": ntk.by_hooks, "together": ntk.together, "one by one": ntk.one_by_one,
                                "loop": ntk.looped}
    table: dict[str, dict[str, float]] = {}
    for count in counts:
        x_N = data.x_N[:count]
        times = {"explicit": _seconds(partial(ntk.explicit, net, x_N))}
        times |= {name: _seconds(partial(route, net, x_N)) for name, route in routes.items()}
        table[f"{count} inputs"] = {name: float(f"{1000 * value:.3g}") for name, value in times.items()}
    automatic = ("together", "one by one", "loop")
    return Check(
        name="the closed form is the fastest for perceptrons",
        claim="at every number of inputs the closed form takes less time than every automatic route",
        measured={name: {"explicit": row["explicit"], "by hooks": row["by hooks"]} for name, row in table.items()},
        control={name: {route: row[route] for route in automatic} for name, row in table.items()},
        holds=all(row["explicit"] < min(row[route] for route in automatic) for row in table.values()),
        why="milliseconds of processor time, best of three, one thread; the hooks do the same products in any network",
    )


def _seconds(work: Callable[[], object]) -> float:
    times = []
    for _ in range(3):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return max(min(times), 1e-6)


def _small(data: Labelled, size: Size, seed: int) -> Check:
    width, depth, count = (100, 4, 50) if size == "quick" else (200, 10, 200)
    net, x_N = _perceptron(seed, width, depth), data.x_N[:count]
    peaks = {name: round(peak_bytes(partial(route, net, x_N)) / 2**20, 2)
             for name, route in {"one by one": ntk.one_by_one, "by hooks": ntk.by_hooks}.items()}
    full = {name: round(peak_bytes(partial(route, net, x_N)) / 2**20, 2)
            for name, route in {"together": ntk.together, "loop": ntk.looped}.items()}
    return Check(
        name="one layer at a time needs less memory",
        claim="for a deep perceptron the largest live memory one layer at a time is below that of the full Jacobian",
        measured=peaks,
        control=full,
        holds=peaks["one by one"] < min(full.values()),
        why=f"MiB of tensors alive at once, counted as they are made and freed; {depth} layers of {width}, {count} "
        "inputs",
    )


def _stand_in(data: Labelled, test: Labelled, size: Size, seed: int) -> Check:
    net = _perceptron(seed)
    start = ntk.total(ntk.explicit(net, _joined(data, test)))
    fit(net, data, Recipe(100 if size == "quick" else 600, batch=100, learning_rate=2e-3, seed=seed))
    parts = ntk.explicit(net, _joined(data, test))
    after, labels = ntk.total(parts), 2.0 * data.labels_N - 1
    network = accuracy(net, test)
    trained, initial = (_ridge(kernel, data, test) for kernel in (after, start))
    linear = _ridge(_joined(data, test).flatten(1) @ _joined(data, test).flatten(1).T, data, test)
    known = slice(0, len(data))
    return Check(
        name="the kernel stands in for the network",
        claim="kernel ridge with the trained network's kernel is at most 3 points below the network on other digits",
        measured={"network": network, "kernel of the trained network": trained,
                  "trace by part": {name: round(share, 3) for name, share in ntk.trace_shares(parts).items()},
                  "drift": round(ntk.drift(start[known, known], after[known, known]), 3),
                  "alignment before and after": [round(ntk.alignment(k[known, known], labels), 3)
                                                 for k in (start, after)]},
        control={"kernel at the start": initial, "inputs' own kernel": linear},
        holds=trained > network - 0.03 if size == "full" else None,
        why="digits below five against the others, ridge 0.001 of the mean trace. Quick trains too little to tell",
    )


def _joined(data: Labelled, test: Labelled) -> Tensor:
    return torch.cat([data.x_N, test.x_N])


def _ridge(kernel: Tensor, data: Labelled, test: Labelled) -> float:
    count = len(data)
    found_M = ntk.kernel_ridge(kernel[:count, :count], 2.0 * data.labels_N - 1, kernel[count:, :count])
    return round(float(((found_M > 0).long() == test.labels_N).double().mean()), 4)


def _conditioned(data: Labelled, test: Labelled, size: Size, seed: int) -> Check:
    widths, seeds = ((16, 64), 1) if size == "quick" else ((8, 16, 32, 64, 128), 3)
    rows = []
    for width in widths:
        for draw in range(seed, seed + seeds):
            net = _perceptron(draw, width).double()
            found = ntk.conditioning(ntk.total(ntk.explicit(net, data.x_N[:100].double())))
            fit(net.float(), data, Recipe(60 if size == "quick" else 400, batch=100, learning_rate=2e-3, seed=draw))
            rows.append((width, float(f"{found:.3g}"), accuracy(net, test)))
    conditions, scores = [row[1] for row in rows], [row[2] for row in rows]
    rank = float(spearmanr(conditions, scores).statistic)
    mixed = float(spearmanr(random.Random(seed).sample(conditions, len(conditions)), scores).statistic)
    return Check(
        name="conditioning goes with accuracy",
        claim="over widths and seeds, the rank correlation of conditioning at the start (smallest over largest "
        "eigenvalue) and accuracy after training is above 0.5 or below -0.5",
        measured={"correlation": round(rank, 3), "width, conditioning, accuracy": rows},
        control={"conditioning shuffled": round(mixed, 3)},
        holds=abs(rank) > 0.5 if size == "full" else None,
        why="the paper names no direction; width moves both, so this cannot say that one causes the other. Quick has "
        "too few networks to tell",
    )
