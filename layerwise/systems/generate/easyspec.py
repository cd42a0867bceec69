"""EasySpec: Layer-Parallel Speculative Decoding for Efficient Multi-GPU Utilization (arXiv 2502.02493)

Claims: guesses may come from layers in a looser order, attention of four layers at once, with at most 7 % less
accepted and a drafting stage up to 1.62 times as fast; reading what was accepted once more in order, the bonus
calibration, makes up for what that leaves in the drafter's cache; and the output is that of the model, whatever the
guesses.

From summaries of the paper: groups of N = 1 to 5 between the first and the last layer, feed-forward halves one after
the other, calibration over accepted tokens and the bonus token, its last prediction the first guess. Ours: how halves
add up; the model guesses for itself and a copy without a few layers for it, since there is no smaller relative; one
guess a place; a guess is drawn with the number its place is drawn with and counts where both agree, which keeps the law
but accepts less than the rejection rule at a temperature; and a count of halves in place of eight devices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

import layerwise as lw
from layerwise.allocate.plan import Edit
from layerwise.data import Interval, text_blocks
from layerwise.data.bootstrap import ratio_interval
from layerwise.generate import skip
from layerwise.serve.drafts import Drafter
from layerwise.serve.model_drafts import SecondModel, SomeLayers
from layerwise.serve.relaxed import InGroups, critical_path
from layerwise.serve.request import Completion
from layerwise.stack.decoder import DecoderStack
from layerwise.stack.prepared import prepared
from layerwise.systems.base import Check, Size
from layerwise.systems.served import same

GUESSES, PROMPT, GROUP = 5, 48, 4
"""Guesses a round, tokens of a prompt, and the size of groups that the paper recommends."""
LOST, FASTER = 0.07, 1.62


@dataclass(frozen=True)
class Scale:
    """Prompts, tokens of each answer, sizes of groups, temperatures, layers that the copy lacks."""

    prompts: int
    tokens: int
    groups: tuple[int, ...]
    temperatures: tuple[float, ...]
    dropped: int


SCALES: dict[Size, Scale] = {
    "quick": Scale(2, 10, (1, 4), (0.0,), 2), "full": Scale(8, 40, (1, 2, 3, 4, 5), (0.0, 0.8), 3)}


@dataclass(frozen=True)
class Setting:
    """Who guesses, in groups of how many layers, calibrated or not, and the temperature."""

    who: str
    group: int
    calibrated: bool
    temperature: float

    def __str__(self) -> str:
        return f"{self.who}, groups of {self.group}, {'' if self.calibrated else 'not '}calibrated"


@dataclass(frozen=True)
class Round:
    """The answers under one setting."""

    tokens: list[list[int]]
    accepted: list[int]
    drafted: list[int]

    @property
    def share(self) -> Interval:
        """Guesses that were accepted, prompts resampled."""
        return ratio_interval(self.accepted, [max(1, count) for count in self.drafted])

    @property
    def length(self) -> float:
        """Tokens that come of a round: accepted ones and the one after them."""
        generated = sum(map(len, self.tokens)) - len(self.tokens)  # the first token comes with the prompt
        return generated / max(1, generated - sum(self.accepted))


Found = Mapping[Setting, Round]


def run(size: Size, seed: int) -> list[Check]:
    """Answers of the engine under every drafter, group size, calibration and temperature."""
    scale, opened = SCALES[size], lw.open("smollm2")
    assert isinstance(opened, DecoderStack) and opened.tokenizer is not None
    text = text_blocks("default", opened.tokenizer, length=PROMPT, blocks=scale.prompts, split="verification")
    study = Study(opened, text.tokens_NT.tolist(), scale, seed)
    found = {setting: study.ask(study.drafter(setting), setting.temperature) for setting in settings(scale)}
    return [_law(study, found), _acceptance(study, found, size), _calibration(found, scale, size),
            _path(study, found, scale)]


def settings(scale: Scale) -> list[Setting]:
    """Every group size for the model itself, the first and the recommended one for the copy."""
    sizes = {"itself": scale.groups, "the copy": (1, GROUP)}
    return [Setting(who, group, calibrated, temperature) for who, groups in sizes.items() for group in groups
            for calibrated in ((True, False) if group > 1 else (True,)) for temperature in scale.temperatures]


class Study:
    """The model, its copy without the layers of least influence, and the answers without guesses."""

    def __init__(self, opened: DecoderStack, prompts: list[list[int]], scale: Scale, seed: int) -> None:
        self.prompts, self.scale, self.seed, self.depth = prompts, scale, seed, len(opened)
        self.models = {"itself": prepared(opened.copied(torch.float32)),
                       "the copy": prepared(_degraded(opened, scale.dropped, seed).copied(torch.float32))}
        self.plain = {temperature: self.ask(None, temperature) for temperature in scale.temperatures}

    def drafter(self, setting: Setting) -> Drafter:
        return SecondModel(self.models[setting.who], GUESSES, InGroups(setting.group), setting.calibrated)

    def ask(self, drafter: Drafter | None, temperature: float, **options: Any) -> Round:
        engine = lw.Engine(self.models["itself"], drafter=drafter, prepare=False, cache_tokens=2048, **options)
        params = [lw.Params(max_tokens=self.scale.tokens, temperature=temperature, stop_ids=(),
                            seed=1000 * self.seed + index) for index in range(len(self.prompts))]
        answers: list[Completion] = engine.generate(self.prompts, params)
        usages = [answer.usage for answer in answers]
        return Round([list(answer.tokens) for answer in answers], [usage.accepted for usage in usages],
                     [usage.drafted for usage in usages])


def _degraded(stack: DecoderStack, count: int, seed: int) -> DecoderStack:
    """A copy without the `count` layers that turn the residual stream least."""
    assert stack.tokenizer is not None
    text = text_blocks("default", stack.tokenizer, length=128, blocks=2, seed=seed)
    layers = sorted(lw.measure(stack, text, ["block-influence"], progress=False)["block-influence"].ranking()[:count])
    edits = tuple(Edit(layer, "drop") for layer in layers)
    copy = lw.apply(stack, lw.Plan(stack.spec.fingerprint(), len(stack), edits))
    assert isinstance(copy, DecoderStack)
    return copy


def _law(study: Study, found: Found) -> Check:
    equal = [round.tokens == study.plain[setting.temperature].tokens for setting, round in found.items()]
    loose = InGroups(GROUP)
    alone = {f"temperature {temperature}": same(study.ask(None, temperature, action=loose).tokens, plain.tokens)
             for temperature, plain in study.plain.items()}
    return Check(
        name="guesses change nothing but time",
        claim="with every drafter, group size, calibration and temperature, answers are those without guesses",
        measured={"settings": len(equal), "of them with equal answers": sum(equal)},
        control={f"share of tokens equal where groups of {GROUP} answer by themselves": alone},
        holds=all(equal),
        why=f"{len(study.prompts)} prompts of {PROMPT} tokens, {study.scale.tokens} tokens each, in float32, token for "
            "token under the same seeds; the law itself is tested on a vocabulary of seven with a second model")


def _shares(found: Found, who: str, calibrated: bool = True) -> dict[str, dict[str, str]]:
    table: dict[str, dict[str, str]] = {}
    for setting, round in found.items():
        if setting.who == who and (setting.calibrated == calibrated or setting.group == 1):
            row = table.setdefault(f"temperature {setting.temperature}", {})
            row[f"groups of {setting.group}"] = f"{round.share}, {round.length:.2f} tokens a round"
    return table


def _kept(found: Found, setting: Setting) -> float:
    """Acceptance divided by that of the same drafter with its layers in order."""
    ordered = found[Setting(setting.who, 1, True, setting.temperature)]
    return found[setting].share.value / max(1e-9, ordered.share.value)


def _acceptance(study: Study, found: Found, size: Size) -> Check:
    kept = {setting: _kept(found, setting) for setting in found if setting.group == GROUP and setting.calibrated}
    layers = skip.unified(study.depth, 2 * study.depth / critical_path(study.depth, GROUP))
    drafters: dict[str, Drafter] = {
        f"feed-forward halves of {GROUP} layers at once as well": SecondModel(
            study.models["itself"], GUESSES, InGroups(GROUP, whole=True), calibrate=True),
        f"{len(layers)} even layers, the others skipped": SomeLayers(layers, GUESSES)}
    controls = {name: {f"temperature {temperature}": str(study.ask(drafter, temperature).share)
                       for temperature in study.scale.temperatures} for name, drafter in drafters.items()}
    return Check(
        name=f"groups of {GROUP} are accepted nearly as often",
        claim=f"calibrated guesses from attention of {GROUP} layers at once are accepted at most {LOST:.0%} less often "
              "than those of the same drafter in order",
        measured={"share kept": {f"{setting.who} at {setting.temperature}": round(share, 3)
                                 for setting, share in kept.items()},
                  "accepted": {who: _shares(found, who) for who in ("itself", "the copy")}},
        control=controls,
        holds=all(share >= 1 - LOST for share in kept.values()) if size == "full" else None,
        why=f"share of {GUESSES} guesses a round that were accepted, of the model guessing for itself and of a copy "
            f"without {study.scale.dropped} of {study.depth} layers; the paper's drafters have 0.5 to 8 billion "
            "parameters, whose layers change the stream less one by one. Skipping has about as many halves in a row")


def _calibration(found: Found, scale: Scale, size: Size) -> Check:
    gains = {setting: found[setting].share.value - found[_without(setting)].share.value
             for setting in found if setting.calibrated and setting.group > 1}
    small, large = min(group for group in scale.groups if group > 1), max(scale.groups)
    rising = all(gains[Setting("itself", large, True, temperature)] > gains[Setting("itself", small, True, temperature)]
                 for temperature in scale.temperatures)
    table: dict[str, dict[str, float]] = {}
    for setting, gain in gains.items():
        table.setdefault(f"{setting.who} at {setting.temperature}", {})[f"groups of {setting.group}"] = round(gain, 3)
    return Check(
        name="calibration raises acceptance",
        claim="guesses are accepted more often with calibration, and it brings the more the larger the groups",
        measured={"gain in the share accepted": table},
        control={"accepted without": {who: _shares(found, who, calibrated=False) for who in ("itself", "the copy")}},
        holds=all(gain > 0 for gain in gains.values()) and rising if size == "full" else None,
        why=f"holds where every gain is above zero and that of groups of {large} is above that of groups of {small}. "
            "Calibration acts twice: the cache is exact, and the first guess of a round comes from layers in order, "
            "which for the model itself is always right")


def _without(setting: Setting) -> Setting:
    return Setting(setting.who, setting.group, False, setting.temperature)


def _path(study: Study, found: Found, scale: Scale) -> Check:
    order, verify = critical_path(study.depth, 1), critical_path(study.depth, 1)
    drafting = {group: order + (GUESSES - 1) * critical_path(study.depth, group) for group in scale.groups}
    rows: dict[str, dict[str, float]] = {}
    for group in scale.groups:
        rows[f"groups of {group}"] = {
            "drafting stage": round(drafting[1] / drafting[group], 2),
            "one pass": round(order / critical_path(study.depth, group), 2),
            **{f"tokens at {temperature}": round(_gain(found, group, temperature, drafting, verify), 2)
               for temperature in scale.temperatures}}
    return Check(
        name="fewer halves in a row",
        claim=f"drafting is up to {FASTER} times as fast on as many devices as a group has layers",
        measured={"times as fast as in order, by halves of layers in a row": rows},
        control={"layers in order": 1.0},
        holds=None,
        why=f"counted, not timed: every half takes one unit, {GUESSES} guesses a round, the first from the calibrating "
            "pass in order, and one pass of the model verifies them. Devices that talk cost more, and "
            "attention over long texts takes more than its half, so this size cannot tell")


def _gain(found: Found, group: int, temperature: float, drafting: Mapping[int, int], verify: int) -> float:
    """Tokens for each unit of a round, divided by those of layers in order."""
    def pace(size: int) -> float:
        return found[Setting("itself", size, True, temperature)].length / (drafting[size] + verify)
    return pace(group) / pace(1)
