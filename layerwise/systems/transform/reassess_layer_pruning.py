"""Reassessing Layer Pruning in LLMs: New Insights and Methods (arXiv 2411.15558)

Claims, with a quarter of the blocks removed and the model fine-tuned: dropping the last blocks is as good as any
selection metric; and training only the head and the last three blocks left is at least as good as LoRA.

From the official code: the rankings, LoRA's rank and targets, what partial fine-tuning trains. Ours: one small model,
plain English instead of instructions, tens of steps instead of thousands, and so rates far above the published 1e-5,
for each method the best of a few on calibration text. Influence is a mean over tokens and scores the last block too,
where the code takes one cosine of a whole batch and leaves that block out; the head is untied from the embedding
before it is trained.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import layerwise as lw
from layerwise.allocate.plan import Edit
from layerwise.data import TASKS, Losses, MultipleChoice, TextData, accuracy, perplexity, scorer, text_blocks
from layerwise.stack.decoder import DecoderStack
from layerwise.systems.base import Check, Size
from layerwise.train.heal import Lora, Partial, heal
from layerwise.train.loop import Recipe

METRICS = ("weight-l1", "weight-l2", "taylor", "block-influence", "leave-one-out")
METHODS: dict[str, Lora | Partial] = {"lora": Lora(), "last 3": Partial(3), "head only": Partial(0)}
RATES = {("best", "lora"): 3e-3, ("best", "last 3"): 3e-4, ("tail", "last 3"): 3e-3, ("tail", "lora"): 1e-2,
         ("tail", "head only"): 3e-3, ("random 0", "last 3"): 3e-3}
"""Learning rate by what was dropped and how it heals: what full heals; quick takes the first three."""


@dataclass(frozen=True)
class Scale:
    """Blocks of 128 tokens to calibrate and verify on, questions, and batches of such blocks to heal on."""

    calibration: int
    verification: int
    questions: int
    steps: int
    batch: int


SCALES: dict[Size, Scale] = {"quick": Scale(2, 4, 0, 2, 1), "full": Scale(8, 16, 48, 60, 2)}


@dataclass(frozen=True)
class Held:
    """A model on held-out text, and where there are questions the share of next sentences found among four."""

    losses: Losses
    accuracy: float | None

    @staticmethod
    def of(stack: DecoderStack, text: TextData, questions: MultipleChoice | None) -> Held:
        assert stack.tokenizer is not None
        return Held(perplexity(stack, text, len(text)),
                    accuracy(scorer(stack), questions, stack.tokenizer).value if questions else None)

    def plain(self) -> dict[str, float]:
        found = {"perplexity": round(self.losses.perplexity, 2)}
        return found if self.accuracy is None else found | {"accuracy": round(self.accuracy, 3)}


def run(size: Size, seed: int) -> list[Check]:
    """Seven of thirty layers removed by every ranking; held-out perplexity before and after equal healing."""
    scale, stack = SCALES[size], lw.open("smollm2")
    assert isinstance(stack, DecoderStack) and stack.tokenizer is not None
    text = text_blocks("default", stack.tokenizer, length=128, blocks=scale.verification, split="verification")
    questions = TASKS["next-sentence"]().take(scale.questions, seed) if size == "full" else None
    calibration = text_blocks("default", stack.tokenizer, length=128, blocks=scale.calibration, seed=seed)
    cut = {name: without(stack, order[: len(stack) // 4]) for name, order in rankings(stack, calibration, seed).items()}
    losses = {name: perplexity(model, text, len(text)) for name, model in cut.items()}
    best = min(METRICS, key=lambda name: losses[name].mean)
    cut["best"] = cut[best]
    held = {name: Held.of(model, text, questions)
            for name, model in (("nothing dropped", stack), ("tail", cut["tail"]), ("best", cut["best"]))}
    blocks = text_blocks("default", stack.tokenizer, length=128, blocks=scale.steps * scale.batch, seed=seed + 1)
    for (of, method), rate in RATES.items() if size == "full" else list(RATES.items())[:3]:
        recipe = Recipe(scale.steps, scale.batch, rate, warmup=max(1, scale.steps // 10), seed=seed)
        model = heal(cut[of], blocks.tokens_NT, METHODS[method], recipe)[0]
        held[f"{of}, {method}"] = Held.of(model, text, questions)
    steps = f"{scale.steps} steps of {scale.batch * 128} tokens, where the paper takes over a thousand"
    return [_before(losses, best, held), _methods(held, steps, size), _tail(held, best, steps, size)]


def rankings(stack: DecoderStack, calibration: TextData, seed: int) -> dict[str, list[int]]:
    """Layers in the order in which they go: by every metric, from the end, and three times at random."""
    scores = lw.measure(stack, calibration, METRICS, seed=seed, progress=False)
    layers = range(len(stack))
    return ({name: scores.ranking(name) for name in METRICS} | {"tail": list(reversed(layers))}
            | {f"random {draw}": random.Random(1000 * seed + draw).sample(layers, len(layers)) for draw in range(3)})


def without(stack: DecoderStack, layers: Sequence[int]) -> DecoderStack:
    """`stack` with some layers dropped."""
    edits = tuple(Edit(layer, "drop") for layer in layers)
    return lw.apply(stack, lw.Plan(stack.spec.fingerprint(), len(stack), edits))


def _before(losses: Mapping[str, Losses], best: str, held: Mapping[str, Held]) -> Check:
    found = {name: round(loss.perplexity, 2) for name, loss in losses.items()}
    draws = {name: found.pop(name) for name in list(found) if name.startswith("random")}
    ratio = losses[best].change(losses["tail"])
    return Check(
        name="before healing: the last blocks against the best metric",
        claim="before any training, dropping the last blocks costs no more perplexity than the best metric's choice",
        measured={"perplexity": found},
        control={"perplexity": draws, "nothing dropped": held["nothing dropped"].plain()},
        holds=None if 1 in ratio else ratio.high < 1,
        why=f"the paper claims this after fine-tuning only. {best} is the best metric, found on the same text, to its "
            f"advantage; perplexity of the tail divided by its: {ratio}")


def _methods(held: Mapping[str, Held], steps: str, size: Size) -> Check:
    ratios = {of: held[f"{of}, lora"].losses.change(held[f"{of}, last 3"].losses)
              for of in ("best", "tail") if f"{of}, lora" in held}
    return Check(
        name="after healing: head and last blocks against LoRA",
        claim="training the head and three blocks predicts no worse than LoRA in as many steps, whatever was dropped",
        measured={name: held[name].plain() for name in held if name.endswith("last 3") and "random" not in name},
        control={name: held[name].plain() for name in held if not name.endswith("last 3")},
        holds=all(ratio.low <= 1 for ratio in ratios.values()) if size == "full" else None,
        why=f"{steps}. Perplexity of the head and three blocks divided by that of LoRA, by what was dropped: "
            + ", ".join(f"{of} {ratio}" for of, ratio in ratios.items()))


def _tail(held: Mapping[str, Held], best: str, steps: str, size: Size) -> Check:
    ratio = _healed(held, "best").losses.change(_healed(held, "tail").losses)
    return Check(
        name="after healing: the last blocks against the best metric",
        claim="each healed the better way, dropping the last blocks predicts no worse than the best metric's choice",
        measured={of: _healed(held, of).plain() for of in ("tail", "best")},
        control={name: held[name].plain() for name in held if "," not in name or name.startswith("random")},
        holds=ratio.low <= 1 if size == "full" else None,
        why=f"{best} is the best metric before healing. {steps}, perhaps too few for a cut that starts further away. "
            f"Perplexity of the tail divided by that of {best}: {ratio}")


def _healed(held: Mapping[str, Held], of: str) -> Held:
    found = (held[f"{of}, {method}"] for method in ("lora", "last 3") if f"{of}, {method}" in held)
    return min(found, key=lambda one: one.losses.mean)
