"""The executable contract of a solver, and the small problems it is tried on."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from layerwise.allocate.choices import Choice, Groups
from layerwise.allocate.links import consistent
from layerwise.allocate.plan import Edit
from layerwise.allocate.solvers.base import Solver
from layerwise.errors import BadBudget, LayerwiseError
from layerwise.spec import Attention, FeedForward, LayerSpec

ROW = LayerSpec(mixer=None, feed_forward=None)
SHARES = {"keep": 1.0, "8 bits": 0.5, "4 bits": 0.3, "3 bits": 0.22, "drop": 0.0}
"""Levels of a layer in `problem`, with the bytes each keeps."""


def problem(seed: int, layers: int = 6, alike: bool = True) -> Groups:
    """Random choices for some layers, an embedding and a fixed rest; costs in whole bytes and in layers.

    Losses grow as bytes shrink. With `alike` all layers have the same size.
    """
    generator = np.random.default_rng(seed)
    sizes = [100] * layers if alike else [int(size) for size in generator.integers(40, 200, layers)]
    groups = [_group(target, size, SHARES, generator) for target, size in enumerate(sizes)]
    groups.append(_group("embedding", 150, {"keep": 1.0, "8 bits": 0.5}, generator))
    return [*groups, [Choice("rest", "keep", (), None, 0.0, {"bytes": 7.0, "layers": 0.0})]]


def _group(
    target: int | str, size: int, shares: Mapping[str, float], generator: np.random.Generator
) -> list[Choice]:
    steps = generator.uniform(0.01, 1, len(shares)) * np.arange(len(shares)) ** 2
    choices: list[Choice] = []
    for (label, share), loss in zip(shares.items(), np.cumsum(steps), strict=True):
        cost = {"bytes": float(round(size * share)), "layers": float(isinstance(target, int) and share > 0)}
        edits = () if label == "keep" else (_some_edit(target, len(choices), loss),)
        before = replace(ROW, feed_forward=FeedForward(size)) if isinstance(target, int) else None
        choices.append(Choice(target, label, edits, before if cost["layers"] else None, float(loss), cost, before))
    return choices


WITH_KEYS = LayerSpec(Attention(heads=4, kv_heads=2, head_dim=16), feed_forward=None)


def linked_problem(seed: int, layers: int = 5) -> Groups:
    """Layers that may read the keys of the one or two before them, keep fewer of their own, or have none.

    Costs in bytes and in cache; random losses, so that links and limits pull in different directions.
    """
    generator = np.random.default_rng(seed)
    groups = []
    for layer in range(layers):
        offered: dict[str, tuple[LayerSpec | None, float, float]] = {
            "keep": (WITH_KEYS, 100, 64), "4 bits": (WITH_KEYS, 30, 64), "narrow": (_mixing(kv_heads=1), 80, 32),
            "drop attention": (ROW, 50, 0), "drop": (None, 0, 0)}
        for back in range(1, min(2, layer) + 1):
            offered |= {f"share {back}": (_mixing(shares=layer - back), 75, 0),
                        f"share {back}, 4 bits": (_mixing(shares=layer - back), 22, 0)}
        losses = generator.exponential(1, len(offered)) * (np.arange(len(offered)) > 0)
        groups.append([
            Choice(layer, label, () if label == "keep" else (_some_edit(layer, place, loss),), row, float(loss),
                   {"bytes": float(size), "cache": float(cache)}, WITH_KEYS)
            for place, ((label, (row, size, cache)), loss) in enumerate(zip(offered.items(), losses, strict=True))])
    return groups


def _some_edit(target: int | str, place: int, loss: float) -> Edit:
    """An edit of its own for each place of a group; to a solver it is a name."""
    return Edit(target, "quantize", {"bits": 4, "group": 32 * place}, float(loss))


def _mixing(**changes: int) -> LayerSpec:
    assert isinstance(WITH_KEYS.mixer, Attention)
    return replace(WITH_KEYS, mixer=replace(WITH_KEYS.mixer, **changes))  # type: ignore[arg-type]


def best(groups: Groups, limits: Mapping[str, float]) -> float:
    """The smallest total loss of consistent choices within `limits`, by trying every combination; infinite where none
    fits.
    """
    return min(
        (
            math.fsum(choice.loss for choice in picked)
            for picked in itertools.product(*groups)
            if fits(picked, limits) and consistent(picked)
        ),
        default=math.inf,
    )


def fits(picked: tuple[Choice, ...] | list[Choice], limits: Mapping[str, float]) -> bool:
    """Whether the total cost is within every limit."""
    return all(
        math.fsum(choice.cost[currency] for choice in picked) <= limit * (1 + 1e-12)
        for currency, limit in limits.items()
    )


def check_solver(solver: Solver, seed: int = 0) -> None:
    """Assert what every solver promises.

    It takes one choice from each group, in order; it respects every limit it accepts; it does the same for
    the same seed; it leaves its input alone; it refuses an impossible budget with BadBudget, naming the
    smallest value the choices reach; it accepts a budget that the original meets. Where a choice needs another, it
    takes both or neither.
    """
    for alike in (True, False):
        groups = problem(seed, alike=alike)
        original = math.fsum(group[0].cost["bytes"] for group in groups)
        for share in (1.0, 0.8, 0.6, 0.45):
            _check_picks(solver, groups, {"bytes": share * original}, seed)
        _check_refusal(solver, groups)
    _check_picks(solver, problem(seed), {"bytes": 500.0, "layers": 5.0}, seed)
    for limits in ({"cache": 320.0}, {"cache": 192.0}, {"cache": 128.0}, {"cache": 192.0, "bytes": 250.0}):
        _check_picks(solver, linked_problem(seed), limits, seed)


def _check_picks(solver: Solver, groups: Groups, limits: Mapping[str, float], seed: int) -> None:
    before = copy.deepcopy(groups)
    try:
        picked = solver.solve(groups, limits, seed)
    except LayerwiseError:
        assert not fits([group[0] for group in groups], limits), (
            f"{solver.name} refuses a budget that the original meets"
        )
        return
    assert groups == before, f"{solver.name} changes its input"
    assert len(picked) == len(groups), f"{solver.name} takes {len(picked)} choices for {len(groups)} groups"
    assert all(choice in group for choice, group in zip(picked, groups, strict=True)), (
        f"{solver.name} takes a choice that its group does not offer"
    )
    assert consistent(picked), f"{solver.name} takes a choice without the one that it needs"
    assert fits(picked, limits), f"{solver.name} passes the limits {dict(limits)}"
    assert solver.solve(groups, limits, seed) == picked, f"{solver.name} does not repeat itself"


def _check_refusal(solver: Solver, groups: Groups) -> None:
    least = math.fsum(min(choice.cost["bytes"] for choice in group) for group in groups)
    refusal = None
    try:
        solver.solve(groups, {"bytes": least - 1}, 0)
    except BadBudget as error:
        refusal = error
    assert refusal, f"{solver.name} accepts a budget below what can be reached"
    assert f"{least:.0f} bytes" in refusal.expected, f"{solver.name} does not name {least:.0f} bytes"
