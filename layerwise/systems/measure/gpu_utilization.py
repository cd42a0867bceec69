"""A Study on the Intersection of GPU Utilization and CNN Inference (arXiv 2212.07936)

Claims: many convolutional networks leave much of the hardware's compute unused at inference; inside a search space
utilization is regular enough that knowing it saves measurements on the device.

From the abstract only; no code and no published numbers were found, so definitions and protocol are our reading:
utilization is operations per second over the measured peak of a large matrix product in the same data type, bytes
are those each convolution must move once, and the search asks how well latency = operations / (utilization x peak)
ranks unseen networks when utilization is fitted on a few measured ones. One processor core stands for the GPU;
random weights, as only speed is measured. On one thread times are the process's own, so that neighbours do not
count.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr

from layerwise.measure.hardware import Machine, machine
from layerwise.measure.timing import busy_clock, interleaved
from layerwise.measure.traffic import Traffic
from layerwise.nets.cnn_space import KINDS, CnnPlan, Kind, Stage, sampled
from layerwise.systems.base import Check, Size

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Scale:
    """Batches of the zoo, subnets, sizes of the training set, draws of it, repeats of a time."""

    batches: tuple[int, ...]
    subnets: int
    known: tuple[int, ...]
    draws: int
    repeats: int


SCALES: dict[Size, Scale] = {"quick": Scale((1, 8), 30, (10, 20), 10, 3),
                             "full": Scale((1, 8, 32), 150, (10, 20, 40), 100, 7)}


@dataclass(frozen=True)
class Measured:
    """One network at one batch: operations, bytes, seconds, and how many parameters it has."""

    plan: CnnPlan
    operations: float
    moved: float
    seconds: float
    parameters: float = 0.0

    def use(self, limits: Machine) -> float:
        """Utilization."""
        return limits.utilization(self.operations, self.seconds)


Named = dict[int, dict[str, Measured]]
"""Batch to network by name."""


def run(size: Size, seed: int) -> list[Check]:
    """A zoo at several batches, then the search space."""
    scale, limits = SCALES[size], machine()
    zoo = {f"{kind}, width {width}": CnnPlan(64, stages(kind, width), stem=width)
           for kind in KINDS for width in (16, 64)}
    plans = list(zoo.values())
    named = {batch: dict(zip(zoo, measured(plans, batch, scale.repeats), strict=True)) for batch in scale.batches}
    largest = scale.batches[-1]
    space = measured(sampled(scale.subnets, seed), 8, scale.repeats)
    return [_unused(named, limits), _depthwise(named[largest], largest, limits, scale.repeats),
            _batch(named, measured(plans, 1, scale.repeats), limits), _search(space, limits, scale, size, seed)]


def stages(kind: Kind, width: int) -> tuple[Stage, ...]:
    return Stage(kind, 2, width), Stage(kind, 2, 2 * width), Stage(kind, 2, 4 * width)


def measured(plans: Sequence[CnnPlan], batch: int, repeats: int) -> list[Measured]:
    """Operations, bytes and time of every plan on `batch` random pictures."""
    nets = [plan.build() for plan in plans]
    inputs = [torch.randn(batch, 3, plan.resolution, plan.resolution) for plan in plans]
    with torch.inference_mode():
        works: dict[int, Callable[[], object]] = {
            place: lambda net=net, x=x: net(x)  # type: ignore[misc]
            for place, (net, x) in enumerate(zip(nets, inputs, strict=True))}
        seconds = interleaved(works, repeats, clock=busy_clock())
        found = []
        for place, plan in enumerate(plans):
            with Traffic() as traffic:
                works[place]()
            found.append(Measured(plan, traffic.operations, traffic.moved, seconds[place],
                                  sum(parameter.numel() for parameter in nets[place].parameters())))
    return found


def _unused(named: Named, limits: Machine) -> Check:
    uses = {f"batch {batch}": {name: round(net.use(limits), 3) for name, net in rows.items()}
            for batch, rows in named.items()}
    ones = [net.use(limits) for net in named[1].values()]
    a = torch.randn(512, 512)
    product = interleaved({"": lambda: a @ a}, 9, clock=busy_clock())[""]
    return Check(
        name="networks leave much of the hardware unused",
        claim="at batch 1 most networks of the zoo use less than half of the peak",
        measured=uses | {"peak, GFLOP/s": round(limits.peak / 1e9, 1),
                         "bandwidth, GB/s": round(limits.bandwidth / 1e9, 1)},
        control={"a matrix product of 512": round(limits.utilization(2 * 512**3, product), 3)},
        holds=sum(use < 0.5 for use in ones) > len(ones) / 2,
        why="operations of convolutions and linear layers over time and measured peak; the product is small work that "
            "keeps the hardware busy")


def _depthwise(rows: dict[str, Measured], batch: int, limits: Machine, repeats: int) -> Check:
    kinds = {kind: mean(net.use(limits) for name, net in rows.items() if name.startswith(kind)) for kind in KINDS}
    narrow = rows["depthwise, width 16"]
    [full] = measured([CnnPlan(64, stages("expanded", 16), stem=16)], batch, repeats)
    return Check(
        name="depthwise networks use least",
        claim="networks of depthwise blocks use less than half of what plain convolutions use, at the largest batch",
        measured={kind: round(use, 3) for kind, use in kinds.items()}
        | {"depthwise, width 16": round(narrow.use(limits), 3),
           "operations per byte": {name: round(net.operations / net.moved, 1) for name, net in rows.items()}},
        control={"the same with all channels mixed": round(full.use(limits), 3)},
        holds=kinds["depthwise"] < 0.5 * kinds["plain"],
        why=f"mean over two widths; the machine turns from memory to compute at {limits.balance:.1f} operations per "
            "byte. The control differs from the narrow depthwise net in the grouping alone")


def _batch(named: Named, again: Sequence[Measured], limits: Machine) -> Check:
    first, last = named[min(named)], named[max(named)]
    gains = {name: round(last[name].use(limits) / net.use(limits), 3) for name, net in first.items()}
    repeated = [round(second.use(limits) / net.use(limits), 3)
                for second, net in zip(again, first.values(), strict=True)]
    return Check(
        name="larger batches use more",
        claim=f"every network uses more of the peak at batch {max(named)} than at batch 1",
        measured=gains, control={"batch 1 measured again": repeated},
        holds=min(gains.values()) > 1,
        why="utilization at the largest batch over that at batch 1; the control says how far a ratio moves by itself. "
            "A batch whose activations no longer fit the caches can use less, above all where every byte is used for "
            "few operations")


def described(net: Measured) -> list[float]:
    """What is known of a network without running it: shape and aggregate intensity."""
    stages = net.plan.stages
    weight = sum(stage.depth for stage in stages)
    return [math.log(net.plan.resolution), float(weight), *(math.log(stage.width) for stage in stages),
            sum(stage.depth * (stage.kernel == 5) for stage in stages) / weight,
            sum(stage.depth * (stage.kind == "depthwise") for stage in stages) / weight,
            sum(stage.depth * (stage.kind == "residual") for stage in stages) / weight,
            math.log(net.operations / net.moved)]


def ridge(x_NC: Array, y_N: Array, unseen_MC: Array, strength: float = 1.0) -> Array:
    """Least squares on standardized columns with a ridge."""
    centre, scale = x_NC.mean(0), x_NC.std(0) + 1e-9
    x_NC, unseen_MC = (x_NC - centre) / scale, (unseen_MC - centre) / scale
    gram = x_NC.T @ x_NC + strength * np.eye(x_NC.shape[1])
    return np.asarray(unseen_MC @ np.linalg.solve(gram, x_NC.T @ (y_N - y_N.mean())) + y_N.mean())


def ranked(space: Sequence[Measured], limits: Machine, known: int, draw: random.Random) -> dict[str, float]:
    """Rank correlation of predicted and true latency on networks that were not measured, by way of predicting."""
    order = draw.sample(range(len(space)), len(space))
    seen, rest = order[:known], order[known:]
    x = np.array([described(net) for net in space])
    work = np.log([net.operations for net in space])
    time, use = np.log([net.seconds for net in space]), np.log([net.use(limits) for net in space])
    with_work = np.column_stack([x, work])
    mixed = draw.sample(seen, known)
    predicted = {
        "by utilization": work[rest] - ridge(x[seen], use[seen], x[rest]),
        "by utilization, operations known": work[rest] - ridge(with_work[seen], use[seen], with_work[rest]),
        "latency directly": ridge(x[seen], time[seen], x[rest]),
        "latency directly, operations known": ridge(with_work[seen], time[seen], with_work[rest]),
        "operations alone": work[rest],
        "parameters alone": np.array([net.parameters for net in space])[rest],
        "utilization of other networks": work[rest] - ridge(x[seen], use[mixed], x[rest]),
    }
    return {way: float(spearmanr(values, time[rest]).statistic) if np.ptp(values) else 0.0
            for way, values in predicted.items()}


def _search(space: Sequence[Measured], limits: Machine, scale: Scale, size: Size, seed: int) -> Check:
    found: dict[int, dict[str, float]] = {}
    for known in scale.known:
        draw = random.Random(seed)
        rows = [ranked(space, limits, known, draw) for _ in range(scale.draws)]
        found[known] = {way: round(mean(row[way] for row in rows), 3) for way in rows[0]}
    at = found[20]
    direct = max(at["latency directly"], at["latency directly, operations known"])
    controls = ("operations alone", "parameters alone", "utilization of other networks")
    return Check(
        name="utilization saves measurements in a search",
        claim="fitted on 20 measured networks, the way through utilization ranks the others by latency at least as "
              "well as regressing latency, and better than operations alone by 0.05",
        measured={f"{known} measured": {way: value for way, value in row.items() if way not in controls}
                  for known, row in found.items()},
        control={f"{known} measured": {way: row[way] for way in controls} for known, row in found.items()},
        holds=at["by utilization"] >= direct and at["by utilization"] > at["operations alone"] + 0.05
        if size == "full" else None,
        why="mean rank correlation over draws of the measured networks; the same ridge and descriptors everywhere. "
            "With log operations among them, log latency and log utilization differ by a known number, so both "
            "regressions say nearly the same, and knowing utilization brings nothing new. Quick has too few networks")
