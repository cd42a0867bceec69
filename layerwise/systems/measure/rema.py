"""REMA: A Unified Reasoning Manifold Framework for Interpreting Large Language Model (arXiv 2509.22518)

Claims: states of correct answers lie on a set of few dimensions; wrong answers lie farther from it, measured by
the distance to their nearest correct neighbours, and can be told from correct ones; the layer where that
distance first leaves the spread of correct answers is where the error begins.

From the abstract: the distance, the baseline of correct answers, the layer of divergence. Ours, as no code or
constants were found: k = 5, divergence at 1.5 standard deviations for three layers, tasks that a model of 135M
gets half right (a sum with one digit, letters of a word), states averaged over the answer and, free of what the
answer says, at the last token of the prompt. Correct answers are halved into a reference and a held-out group,
and both groups are compared with the reference, as distances within it have fewer neighbours. The dimension is
the two-neighbour estimate (Facco et al. 2017); a public implementation that drops none of the ratios gives the
same number on the same points where ours is told to drop none.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import layerwise as lw
from layerwise.data.sources import default_text
from layerwise.generate.answers import answers
from layerwise.measure.departure import ALPHA, HOLD, departure, distances, normalized
from layerwise.measure.neighbours import mahalanobis, participation_ratio, two_nn
from layerwise.measure.separation import auroc, probe_scores, shuffled_within, within
from layerwise.stack.decoder import DecoderStack
from layerwise.systems.base import Check, Size

SHOTS, LEAST = 4, 20
Item = tuple[str, str, str]
"""Prompt, right answer, and its difficulty."""


@dataclass(frozen=True)
class Judged:
    """States [N, L, C] by pooling, which answers were right [N], how sure the model was [N], difficulty.

    `commonest` is the share of the answer that was given most often.
    """

    states: dict[str, Tensor]
    right_N: Tensor
    confidence_N: Tensor
    difficulty: Sequence[str]
    commonest: float = 0.0


def run(size: Size, seed: int) -> list[Check]:
    """Both tasks on SmolLM2; quick asks for a few sums only, and mostly cannot tell."""
    stack = lw.open("smollm2")
    assert isinstance(stack, DecoderStack)
    tasks = {"sums": sums_items(seed)} if size == "quick" else {
        "sums": sums_items(seed), "letters": letter_items(seed)}
    count = 96 if size == "quick" else 600
    return [check for name, items in tasks.items()
            for check in analysis(name, asked(stack, items[: count + SHOTS]), stack.spec.hidden, seed)]


def sums_items(seed: int) -> list[Item]:
    """A number below 80 plus one digit; difficulty: carry and length of the answer."""
    pairs = [(a, b) for a in range(1, 80) for b in range(1, 10)]
    random.Random(seed).shuffle(pairs)
    return [(f"{a} + {b} =", f" {a + b}", f"carry {a % 10 + b > 9}, {len(str(a + b))} digits") for a, b in pairs]


def letter_items(seed: int) -> list[Item]:
    """How often a letter occurs in a common word; difficulty: the answer and the length of the word."""
    words = Counter(word for text in default_text() for word in re.findall(r"\b[a-z]{5,9}\b", text))
    draw = random.Random(seed)
    asked = [(word, letter) for word, _ in words.most_common(400) for letter in draw.sample(sorted(set(word)), 2)]
    draw.shuffle(asked)
    return [(f"The letter {letter} appears in {word} this many times:", f" {word.count(letter)}",
             f"{word.count(letter)}, {'long' if len(word) > 6 else 'short'}") for word, letter in asked]


def asked(stack: DecoderStack, items: Sequence[Item]) -> Judged:
    """The first items are shown with their answers, the rest are answered."""
    assert stack.tokenizer is not None
    encode = stack.tokenizer.encode
    head = "".join(f"{prompt}{answer}\n" for prompt, answer, _ in items[:SHOTS])
    stop, rest = encode("\n")[-1], items[SHOTS:]
    said = answers(stack, [encode(head + prompt) for prompt, _, _ in rest], 5, stop)
    right = [list(ids) == encode(answer) for ids, (_, answer, _) in zip(said.ids, rest, strict=True)]
    return Judged({"answer": said.answer_NLC, "prompt": said.prompt_NLC}, torch.tensor(right), said.confidence_N,
                  [difficulty for _, _, difficulty in rest], Counter(said.ids).most_common(1)[0][1] / len(rest))


def analysis(name: str, judged: Judged, width: int, seed: int) -> list[Check]:
    """Every claim on one task; one check without a verdict where too few answers are right or wrong."""
    right, wrong = (int((judged.right_N == side).sum()) for side in (True, False))
    if right < 2 * LEAST or wrong < LEAST:
        return [Check(name=f"{name}: too few answers", claim="there are right and wrong answers to compare",
                      measured={"right": right, "wrong": wrong}, control=None, holds=None,
                      why=f"needs {2 * LEAST} right answers and {LEAST} wrong ones")]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(judged.right_N), generator=generator)
    members = order[judged.right_N[order]]
    reference, rest = members[: right // 2], torch.cat([members[right // 2 :], order[~judged.right_N[order]]])
    rest = rest[torch.randperm(len(rest), generator=generator)]
    return [_dimension(name, judged, members, width, generator),
            *(_separation(name, pool, judged, reference, rest, generator) for pool in judged.states),
            _divergence(name, judged, reference, rest), _matched(name, judged, reference, rest, generator)]


def _dimension(name: str, judged: Judged, members: Tensor, width: int, generator: torch.Generator) -> Check:
    clouds = judged.states["answer"][members].unbind(1)
    loose = [torch.stack([column[torch.randperm(len(column), generator=generator)] for column in cloud.T], 1)
             for cloud in clouds]
    mixed = torch.randperm(len(judged.right_N), generator=generator)[: len(members)]
    both = judged.states["answer"][mixed].unbind(1)
    found, null, blend = ([round(two_nn(cloud), 1) for cloud in group] for group in (clouds, loose, both))
    return Check(
        name=f"{name}: correct answers fill few dimensions",
        claim="at every layer the intrinsic dimension of correct answers is below a tenth of the width, and below half "
              "of what the same points show once each coordinate is shuffled",
        measured={"dimension by layer": found, "width": width, "answers": len(members),
                  "participation ratio": [round(participation_ratio(cloud), 1) for cloud in clouds]},
        control={"coordinates shuffled": null, "as many right and wrong answers mixed": blend},
        holds=all(a < 0.1 * width and a < b / 2 for a, b in zip(found, null, strict=True)),
        why="two-neighbour estimate, which sees only a part of the dimensions when points are few: the control says "
            "what it can see here. Where one coordinate holds nearly all variance (participation ratio near 1), "
            "shuffling changes little and the control is low as well")


def _separation(name: str, pool: str, judged: Judged, reference: Tensor, rest: Tensor,
                generator: torch.Generator) -> Check:
    states, wrong_N = judged.states[pool], ~judged.right_N[rest]
    half = len(rest) // 2
    shuffled_N = wrong_N[torch.randperm(len(rest), generator=generator)]
    scores = {f"distance, {kind}": distances(states, reference, rest, scale)
              for kind, scale in (("standardized", True), ("raw", False))}
    centre_LC = states[reference].mean(0)
    scores["distance to the mean"] = (states[rest] - centre_LC).norm(dim=-1).T
    scores["Mahalanobis distance"] = torch.stack(
        [mahalanobis(layer[rest], layer[reference]) for layer in states.unbind(1)])
    found = {kind: _held_out(score_LN, wrong_N, half) for kind, score_LN in scores.items()}
    found["linear probe"] = _held_out(torch.stack(
        [probe_scores(layer[:half], wrong_N[:half], layer) for layer in states[rest].unbind(1)]), wrong_N, half,
        choose=len(states[0]) // 2)
    best = found["distance, standardized"]["AUROC"]
    return Check(
        name=f"{name}: wrong answers lie farther, seen at the {pool}",
        claim="at the best layer the distance to correct neighbours tells wrong from right with AUROC above 0.65",
        measured=found | {"right": int((~wrong_N).sum()), "wrong": int(wrong_N.sum()),
                          "share of the commonest answer": round(judged.commonest, 3)},
        control={"labels shuffled": _held_out(scores["distance, standardized"], shuffled_N, half),
                 "the model's own doubt": round(auroc(-judged.confidence_N[rest][half:], wrong_N[half:]), 3)},
        holds=best > 0.65,
        why="judged on standardized distance; the layer is chosen on one half of the held-out answers and read on the "
            "other, the probe is fitted on the first half and read at the middle layer. Where nearly all answers are "
            "the same, being right is a matter of the question, and no error was made that a state could show")


def _held_out(score_LN: Tensor, wrong_N: Tensor, half: int, choose: int | None = None) -> dict[str, float]:
    first = [auroc(score_N[:half], wrong_N[:half]) for score_N in score_LN]
    layer = max(range(len(first)), key=first.__getitem__) if choose is None else choose
    return {"layer": layer, "AUROC": round(auroc(score_LN[layer][half:], wrong_N[half:]), 3)}


def _divergence(name: str, judged: Judged, reference: Tensor, rest: Tensor) -> Check:
    wrong_N = ~judged.right_N[rest]
    z_LN = normalized(distances(judged.states["answer"], reference, rest, scale=True), wrong_N)
    wrong_LN = z_LN[:, wrong_N]
    errors = wrong_LN.mean(1) / (wrong_LN.std(1) / wrong_LN.shape[1] ** 0.5)
    start = next((layer for layer in range(len(errors)) if bool((errors[layer:] > 3).all())), None)

    def shares(side_N: Tensor) -> dict[str, float]:
        layers, third = departure(z_LN[:, side_N]), len(z_LN) / 3
        parts = Counter("never" if at is None else ("early", "middle", "late")[int(at // third)] for at in layers)
        return {part: round(parts[part] / len(layers), 3) for part in ("early", "middle", "late", "never")}

    return Check(
        name=f"{name}: wrong answers leave the correct ones at some layer",
        claim="from some layer to the last the mean normalized distance of wrong answers exceeds that of correct "
              "ones by three standard errors, and more wrong than correct answers diverge",
        measured={"from layer": start, "z by layer": [round(float(z), 2) for z in wrong_LN.mean(1)],
                  "first diverging": shares(wrong_N)},
        control={"held-out correct answers": shares(~wrong_N)},
        holds=start is not None and shares(wrong_N)["never"] < shares(~wrong_N)["never"],
        why=f"z is in deviations of held-out correct answers; an answer diverges where z stays above {ALPHA} for "
            f"{HOLD} layers; thirds of the depth")


def _matched(name: str, judged: Judged, reference: Tensor, rest: Tensor, generator: torch.Generator) -> Check:
    wrong_N = ~judged.right_N[rest]
    levels = [judged.difficulty[place] for place in rest.tolist()]
    groups = {level: torch.tensor([other == level for other in levels]) for level in sorted(set(levels))}
    score_N = distances(judged.states["answer"], reference, rest, scale=True)[len(judged.states["answer"][0]) // 2]
    value = within(score_N, wrong_N, groups.values())
    draws = sorted(within(score_N, shuffled_within(wrong_N, groups.values(), generator), groups.values())
                   for _ in range(200))
    return Check(
        name=f"{name}: not only because hard items are far",
        claim="among items of equal difficulty wrong answers still lie farther than by chance",
        measured={"AUROC within levels": round(value, 3), "all levels together": round(auroc(score_N, wrong_N), 3),
                  "items": {level: [int(wrong_N[group].sum()), int(group.sum())] for level, group in groups.items()}},
        control={"95th percentile of labels shuffled within levels": round(draws[189], 3)},
        holds=value > draws[189] if value else None,
        why="mean of the AUROC within each level, weighted by its pairs of a wrong and a correct answer, at the middle "
            "layer, which is fixed beforehand; items are counted as [wrong, all]. Cannot tell where no level has both")
