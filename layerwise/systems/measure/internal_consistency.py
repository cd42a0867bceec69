"""Internal Consistency and Self-Feedback in Large Language Models: A Survey (arXiv 2407.14507)

Claims: answers of one model scatter in its lower layers, tighten towards the top, are narrowest at decoding and widen
again over whole responses (the hourglass); consistent is (almost) correct, so that a majority of samples is at least
as good as one sample.

From the abstract and the official experiment: the three levels, heads alone as latent answers, T 0.55, top-p 0.8 and
five draws for responses. Difference found in reading the official code: it scales slices of what attention returns
after the output projection, where heads are mixed already; here they are told apart before it. The official code of
DoLa takes KL(mixture || each) for the divergence, ours the Jensen-Shannon divergence of the paper: over 96 places of
prose it picks the same layer at 96 % (lower half of SmolLM2) and 64 % (upper half), the same token at 98 % and 96 %.
DoLa (arXiv 2309.03883) and self-consistency (2203.11171) are the methods the survey names for acting on the signal.
Ours: model and items (sums, differences and products of one digit, so that an answer is one token), dispersion as the
chance that two answers differ; heads are silenced from the question on, its worked examples are read unchanged; beams
are left out of the decoding set, since for one token they are greedy decoding, and a penalty on repetition, since
digits are repeated rightly.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

import layerwise as lw
from layerwise.generate.draws import draws
from layerwise.generate.sample import Sampling
from layerwise.measure.consistency import chance_dispersion, dispersion, majority
from layerwise.measure.progress import Progress
from layerwise.measure.separation import auroc
from layerwise.stack.decoder import DecoderStack
from layerwise.stack.heads import only_head
from layerwise.systems.asking import CHOICES, Asking, Readings, Sum, fitting, items, read
from layerwise.systems.base import Check, Size


def run(size: Size, seed: int) -> list[Check]:
    """Consistency of SmolLM2 with itself: does it tell right from wrong, and where along the way it is lost."""
    stack = lw.open("smollm2")
    assert isinstance(stack, DecoderStack)
    asking = Asking(stack, seed)
    tried, count, few, stride = (40, 300, 80, 3) if size == "full" else (4, 8, 2, 12)
    signs = fitting(asking, tried)
    sums = items(count, signs, random.Random(seed + 2))
    truth_N = torch.tensor([s.result for s in sums])
    found = read(asking, sums)
    return [
        _signal(found, truth_N, signs, size),
        _vote(found, truth_N),
        _dola(found, truth_N),
        _hourglass(asking, sums[:few], found, stride, size),
    ]


def _signal(found: Readings, truth_N: Tensor, signs: Sequence[str], size: Size) -> Check:
    answer_N, share_N = majority(found.samples_NS, CHOICES)
    right_N, level = answer_N == truth_N, auroc(share_N, answer_N == truth_N)
    order_N = torch.randperm(len(truth_N), generator=torch.Generator().manual_seed(0))
    edges = (0.0, 0.45, 0.65, 0.85, 1.01)
    bins = [right_N[(share_N >= a) & (share_N < b)] for a, b in pairwise(edges)]
    accuracy = [_share(inside_N) if len(inside_N) else None for inside_N in bins]
    present = [value for value in accuracy if value is not None]
    return Check(
        name="consistent is almost correct",
        claim="the majority's share of ten samples tells right from wrong, AUROC above 0.6, and accuracy is higher in "
        "the highest bin of shares than in the lowest",
        measured={"AUROC": _number(level), "accuracy by share (to 0.4, 0.6, 0.8, 1)": accuracy,
                  "items in each": [len(inside_N) for inside_N in bins], "kinds": list(signs)},
        control={"largest probability instead, AUROC": _number(auroc(found.certainty_N, right_N)),
                 "shares shuffled, AUROC": _number(auroc(share_N[order_N], right_N)),
                 "always the commonest majority, accuracy": _share(truth_N == answer_N.mode().values)},
        holds=level > 0.6 and present[-1] > present[0] if size == "full" else None,
        why="ten samples at temperature 0.7 of the one token that answers. Shares of such samples can say no more than "
        "the probability of that token, given as a control; a small model's probabilities know little of what is right",
    )


def _vote(found: Readings, truth_N: Tensor) -> Check:
    single = _share(found.samples_NS == truth_N[:, None])
    voted = _share(majority(found.samples_NS, CHOICES)[0] == truth_N)
    order_N = torch.randperm(len(truth_N), generator=torch.Generator().manual_seed(1))
    other_N, _ = majority(found.samples_NS[order_N], CHOICES)
    return Check(
        name="a majority of samples is at least as good as one",
        claim="accuracy of the majority of ten samples is at least the mean accuracy of a sample",
        measured={"majority": voted, "one sample": single},
        control={"greedy": _share(found.rules_NR[:, 0] == truth_N),
                 "majority of another item's samples": _share(other_N == truth_N)},
        holds=voted >= single,
        why="a vote loses where the likeliest answer is mostly wrong; greedy is a vote of endless samples",
    )


def _dola(found: Readings, truth_N: Tensor) -> Check:
    lower, upper = (_share(found.dola_N2[:, half] == truth_N) for half in (0, 1))
    return Check(
        name="contrast with an early layer (DoLa)",
        claim="contrasting the last layer with an early one changes accuracy; no direction is claimed here",
        measured={"even layers of the lower half": lower, "even layers of the upper half": upper},
        control={"greedy": _share(found.rules_NR[:, 0] == truth_N)},
        holds=None,
        why="reported without a verdict: published gains are for models fifty times as large, on facts",
    )


def _hourglass(asking: Asking, sums: Sequence[Sum], found: Readings, stride: int, size: Size) -> Check:
    layers = range(0, len(asking.stack), stride)
    heads_NLH = _heads_alone(asking, sums, layers)
    third = len(layers) // 3
    levels = {
        "heads, first third": heads_NLH[:, :third].flatten(1),
        "heads, middle third": heads_NLH[:, third : len(layers) - third].flatten(1),
        "heads, last third": heads_NLH[:, len(layers) - third :].flatten(1),
        "lens, first third": found.lens_ND[: len(sums), : len(asking.stack) // 3],
        "lens, last third": found.lens_ND[: len(sums), -len(asking.stack) // 3 :],
        "decoding": found.rules_NR[: len(sums)],
        "responses": _responses(asking, sums),
    }
    spread = {name: round(float(dispersion(answers, CHOICES).mean()), 4) for name, answers in levels.items()}
    truth_N1 = torch.tensor([s.result for s in sums])[:, None]
    return Check(
        name="the hourglass",
        claim="answers scatter less over heads of the last third of the layers than of the first, and less at decoding "
        "than over responses",
        measured={"dispersion": spread,
                  "accuracy": {name: _share(answers == truth_N1) for name, answers in levels.items()}},
        control={"dispersion that base rates alone give": {
            name: round(chance_dispersion(answers, CHOICES), 4) for name, answers in levels.items()}},
        holds=spread["heads, first third"] > spread["heads, last third"] and spread["decoding"] < spread["responses"]
        if size == "full" else None,
        why="dispersion is the chance that two answers to one question differ, mean over questions. A set that gives "
        "one answer to everything is consistent and has a low base rate too",
    )


def _heads_alone(asking: Asking, sums: Sequence[Sum], layers: range) -> Tensor:
    """The likeliest digit with one head of a layer alone, [N, L, H]."""
    tail, heads = asking.tail(sums), asking.stack.spec.rows[0].mixer.heads  # type: ignore[union-attr]
    answers = []
    with torch.inference_mode(), Progress("silencing heads", len(layers) * heads) as bar:
        for layer in layers:
            state = tail.enter(layer)
            for head in range(heads):
                with only_head(asking.stack, layer, head):
                    answers.append(tail.last(tail.run(state))[:, asking.digits_K].argmax(-1))
                bar.step()
    return torch.stack(answers, 1).view(len(sums), len(layers), heads)


def _responses(asking: Asking, sums: Sequence[Sum], tokens: int = 9) -> Tensor:
    """The last token before the end of the line, of five responses that show the middle result, [N, 5]."""
    rows, _ = asking.rows(sums, reasoning=True)
    stop = asking.encode("\n")[-1]
    generator = torch.Generator().manual_seed(asking.seed)
    said_NDA = draws(asking.stack, torch.tensor(rows), 5, Sampling(0.55, top_p=0.8), tokens, stop, generator)
    ended_NDA = said_NDA == stop
    end_ND = torch.where(ended_NDA.any(-1), ended_NDA.int().argmax(-1), said_NDA.shape[-1])
    last_ND = said_NDA.gather(-1, (end_ND - 1).clamp(min=0)[..., None])[..., 0]
    return asking.answer(last_ND)


def _share(right: Tensor) -> float:
    return round(float(right.float().mean()), 4)


def _number(value: float) -> float | None:
    return None if value != value else round(value, 4)
