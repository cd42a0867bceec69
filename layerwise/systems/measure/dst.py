"""Distributional Semantics Tracing (arXiv 2510.06107): where wrong answers are decided, and what pulls them there.

Claims: concept maps by layer tell when a word's usual association wins over its context (strength of the
contextual pathway against hallucination rate: rho = -0.86); after a commitment layer the wrong answer is fixed;
traced input spans are what the answer hangs on.

From abstracts and an early public implementation, read but not run: formulas are our reconstruction. In that code
the concept ablation's hook is commented out, so its importances are zero, and it reads the target's chance at the
prompt's first positions; neither is done here, and so there is no number to compare. Ours: sentences with known senses,
naming the kind of thing instead of yes or no (whose bias swamps a small model), SmolLM2 for models of billions, no
judge, and of the rivals only the model's own doubt (not attention, input gradients or probes).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.stats import spearmanr
from torch import Tensor

import layerwise as lw
from layerwise.data.ambiguous import WORDS, Ambiguous, Item, Sense, items
from layerwise.data.prompts import locate
from layerwise.data.spans import covered, deleted, spans
from layerwise.data.text import Tokenizer
from layerwise.measure.concepts import Concepts, alignment, answers, concept_map, read_concepts, support, support_share
from layerwise.measure.separation import auroc
from layerwise.measure.swap_states import drift, place_states, swapped
from layerwise.stack.decoder import DecoderStack
from layerwise.systems.base import Check, Size
from layerwise.systems.pupil import pupil

COVER = "something"


@dataclass(frozen=True)
class Asked:
    """Items with their tokens, what the model answers, and the concepts in each one's map."""

    stack: DecoderStack
    tokenizer: Tokenizer
    items: list[Item]
    rows: list[tuple[int, ...]]
    concepts: Concepts
    wrong_N: Tensor


def run(size: Size, seed: int) -> list[Check]:
    """Concept maps, swapped states and deleted spans over ambiguous words; a small trained model at quick size."""
    stack, words = _pupil(seed) if size == "quick" else (lw.open("smollm2"), WORDS)
    assert isinstance(stack, DecoderStack) and stack.tokenizer is not None
    asked = _ask(stack, stack.tokenizer, items(words))
    layers = range(0, len(stack), max(1, len(stack) // 8))
    return [*_alignment(asked, layers, size, seed), _commitment(asked, layers, size), _spans(asked, 60, seed)]


def _ask(stack: DecoderStack, tokenizer: Tokenizer, asked: list[Item]) -> Asked:
    rows = [locate(tokenizer, item.before + item.template, item.group).tokens for item in asked]
    concepts = read_concepts(stack, tokenizer, rows, [item.right.tokens(tokenizer) for item in asked],
                             [item.wrong.tokens(tokenizer) for item in asked])
    return Asked(stack, tokenizer, asked, rows, concepts, concepts.odds_DN[-1] <= 0)


def _alignment(asked: Asked, layers: range, size: Size, seed: int) -> list[Check]:
    concepts, wrong_N = asked.concepts, asked.wrong_N
    map_DNK = concept_map(concepts.log_p_DNK, concepts.known_NK)
    score_N = alignment(map_DNK, concepts.right_NK, concepts.wrong_NK)
    early_N = alignment(map_DNK[: 2 * len(map_DNK) // 3], concepts.right_NK, concepts.wrong_NK)
    share_N = support_share(support(asked.stack, asked.rows, concepts.tokens_NK,
                                    torch.where(concepts.right_NK, concepts.tokens_NK, concepts.tokens_NK[:, :1]),
                                    layers), concepts.right_NK)
    generator = torch.Generator().manual_seed(seed)
    order_K = torch.randperm(score_N.shape[0], generator=generator)
    random_N = score_N[order_K]
    groups = sorted({item.group for item in asked.items})
    member_GN = torch.tensor([[item.group == group for item in asked.items] for group in groups])
    rates = [float(wrong_N[own].float().mean()) for own in member_GN]

    def across(value_N: Tensor) -> float:
        means = [float(value_N[own].mean()) for own in member_GN]
        return round(float(spearmanr(means, rates).statistic), 3) if len(set(rates)) > 1 else 0.0

    def detects(value_N: Tensor) -> float:
        return round(auroc(-value_N, wrong_N), 3)

    found, doubt = detects(early_N), detects(-concepts.entropy_N)
    assert 0 < int(wrong_N.sum()) < len(wrong_N), "a model that is always right, or wrong, has no errors to explain"
    return [
        Check(
            name="words whose context is weak are answered wrongly",
            claim="over words, rank correlation of alignment with the error rate is -0.5 or below (published: -0.86)",
            measured={"alignment": across(score_N), "alignment in the first two thirds": across(early_N),
                      "support share": across(share_N), "error rate": round(float(wrong_N.float().mean()), 3)},
            control={"alignment of other items": across(random_N)},
            holds=across(score_N) <= -0.5,
            why=f"{len(groups)} words, {len(asked.items)} items; alignment includes the last layers, whose map is the "
            "answer itself, so its part over the first two thirds is what could be called a forecast",
        ),
        Check(
            name="alignment finds wrong answers better than doubt",
            claim="before the last third of the layers, AUROC of alignment for errors is above chance, and above that "
            "of entropy and of the top probability",
            measured={"alignment in the first two thirds": found, "alignment of all layers": detects(score_N),
                      "support share": detects(share_N)},
            control={"entropy": doubt, "top probability": detects(concepts.top_N),
                     "alignment of other items": detects(random_N)},
            holds=found > max(0.5, doubt, detects(concepts.top_N)),
            why="the last layers' map is the answer itself, so alignment of all layers cannot fail to find errors and "
            "is not judged; a detector in use would not even know which sense is right, which alignment is told",
        ),
    ]


def _commitment(asked: Asked, layers: range, size: Size) -> Check:
    chosen = [index for index, wrong in enumerate(asked.wrong_N.tolist()) if wrong]
    own = [asked.items[index] for index in chosen]
    rows, places = _last_mentions(asked, [item.before for item in own], own)
    told, told_places = _last_mentions(asked, [item.told + item.before for item in own], own)
    told_LBC = place_states(asked.stack, told, told_places)
    opposite = {(item.group, item.right): item.told for item in asked.items}
    contrary = _last_mentions(asked, [opposite[item.group, item.wrong] + item.before for item in own], own)
    senses = [(item.right.tokens(asked.tokenizer), item.wrong.tokens(asked.tokenizer)) for item in own]

    def restored(states_LBC: Tensor) -> list[float]:
        return [round(float((answers(logits_BV, senses) > 0).float().mean()), 3)
                for logits_BV in swapped(asked.stack, rows, places, states_LBC, layers)]

    found, null = restored(told_LBC), restored(place_states(asked.stack, *contrary))
    third = max(1, len(layers) // 3)
    before, after = max(found[:-third]), max(found[-third:])
    away_LB = drift(place_states(asked.stack, rows, places), told_LBC)
    ahead_DN = (asked.concepts.odds_DN[:, chosen] <= 0).flip(0).cumprod(0).flip(0)
    since = (len(ahead_DN) - ahead_DN.sum(0)).tolist()
    return Check(
        name="after a commitment layer the wrong answer is fixed",
        claim="the state of the word where its sense was told, copied at a layer of the first two thirds, repairs at "
        "least twice as many wrong answers as at any layer of the last third, and more than where the wrong sense was "
        "told",
        measured={"repaired": dict(zip(map(str, layers), found, strict=True)),
                  "competitor ahead from this depth on": {str(d): since.count(d) for d in sorted(set(since))},
                  "drift": [round(float(value), 3) for value in away_LB.mean(1)[list(layers)]]},
        control={"wrong sense told": dict(zip(map(str, layers), null, strict=True))},
        holds=(before >= 2 * after and before > max(null)) if size == "full" else None,
        why=f"{len(own)} wrong answers; the state of the word's last mention is replaced by that of the same question "
        "after a sentence that names the right kind" + ("" if size == "full" else "; four layers have no thirds"),
    )


def _spans(asked: Asked, count: int, seed: int) -> Check:
    draw = random.Random(seed)
    chosen = sorted(draw.sample(range(len(asked.items)), min(count, len(asked.items))))
    traced, chance = 0, 0.0
    for index in chosen:
        item = asked.items[index]
        senses = (item.right.tokens(asked.tokenizer), item.wrong.tokens(asked.tokenizer))
        windows = spans(item.before)
        wrong = bool(asked.wrong_N[index])
        odds = _odds(asked, item, [covered(item.before, span, COVER) for span in windows], senses)
        trigger = int((odds if wrong else -odds).argmax())
        left_out = _odds(asked, item, [deleted(item.before, span) for span in windows], senses)
        flipped = (left_out > 0) == torch.tensor(wrong)
        traced += int(flipped[trigger])
        chance += float(flipped.float().mean())
    return Check(
        name="the traced span is what the answer hangs on",
        claim="deleting the span whose covering moves the answer most changes the answer at least 1.5 times as often "
        "as deleting a random span",
        measured={"answers changed": round(traced / len(chosen), 3)},
        control={"random span": round(chance / len(chosen), 3)},
        holds=traced > 0 and traced >= 1.5 * chance,
        why=f"{len(chosen)} items, windows of three, five and seven words of the context; a random span is one of the "
        "same windows. Spans are found by covering words and judged by deleting them, so that they are not judged by "
        "what they were chosen for",
    )


def _odds(asked: Asked, item: Item, befores: Sequence[str], senses: tuple[list[int], list[int]]) -> Tensor:
    rows = [locate(asked.tokenizer, f"{before} {item.template}", item.group).tokens for before in befores]
    states = place_states(asked.stack, rows, [len(row) - 1 for row in rows])[-1]
    logits_1BV = asked.stack.finish(asked.stack.start(torch.tensor([rows[0]])).moved(states[None], len(asked.stack)))
    return answers(logits_1BV[0], [senses] * len(rows))


def _last_mentions(asked: Asked, befores: Sequence[str],
                   own: Sequence[Item]) -> tuple[list[tuple[int, ...]], list[int]]:
    found = [locate(asked.tokenizer, before + item.template, item.group)
             for before, item in zip(befores, own, strict=True)]
    return [prompt.tokens for prompt in found], [prompt.last for prompt in found]


def _pupil(seed: int) -> tuple[DecoderStack, list[Ambiguous]]:
    """Four layers taught twelve invented words of two senses, the first four times as common."""
    draw = random.Random(seed)
    topics = [Sense((f"kind{t}a", f"kind{t}b"), tuple(f"at place{t}{c}" for c in "uvwxy")) for t in range(4)]
    words = [Ambiguous(f"thing{n}", tuple(draw.sample(topics, 2))) for n in range(12)]  # type: ignore[arg-type]
    told = items(words)
    common = {(entry.word, entry.senses[0].kinds) for entry in words}
    sentences = [(item.told if draw.random() < 0.2 else "") + f"{item.text} {draw.choice(item.right.kinds)} ."
                 for item in told for _ in range(4 if (item.group, item.right.kinds) in common else 1)]
    return pupil(sentences, layers=4, width=48, steps=150, seed=seed, words=[COVER]), words
