"""Cross-modal Information Flow in Multimodal Large Language Models (arXiv 2411.18620)

Claims, from cutting attention between groups of positions in a window of layers on questions that LLaVA answers
rightly: the image reaches the question in shallow layers (about 60 % of the answer's probability is lost), the
question reaches the last position in middle ones (30 %), the image hardly reaches the last position itself (5 %);
within the image the asked object matters; the answer appears in lower case before it is capitalised.

From the official code: windows of 9 layers (of 40; here in proportion), relative change of the probability of the
model's own first answer token, averaged over right answers. Its masking, run on a random Llama of ten layers, gives
the probabilities that ours gives within 3e-6. Two differences: a query that loses all its keys keeps itself here,
while there it then sees every position, later ones too; the official tracker projects middle states without the
final norm, here every depth is normed. Ours: the model (`tiny-vlm`, scenes of two things), and a text analogue on
SmolLM2, in which facts take the image's place.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

import layerwise as lw
from layerwise.data.prompts import single_token
from layerwise.data.scene_text import Kind, SceneData, about_scenes
from layerwise.data.scenes import draw_two
from layerwise.measure.progress import Progress
from layerwise.measure.trace import Trace, change, window
from layerwise.systems.base import Check, Size
from layerwise.systems.seeing import PICTURE, Seeing, as_many, patches, positions

KINDS: tuple[Kind, ...] = ("colour", "side")
THINGS = ("ball", "cup", "hat", "car", "door", "box", "book", "chair", "table", "lamp")
HUES = ("red", "blue", "green", "yellow", "black", "white", "brown", "orange")
THREE = ("image -> question", "question -> last", "image -> last")
DIRECT = (
    "In a model of few layers that was tuned from its first layer on, the last position learns what is asked and looks "
    "at the picture itself, so little has to pass through the question"
)
COPIED = (
    "The answer is copied, which the last position can do itself (facts -> last); what kind of answer is wanted "
    "reaches it in the first layers already, which pulls the mean depth of question -> last forward"
)
Groups = Mapping[str, tuple[Tensor, Tensor]]
Curves = dict[str, list[float]]


def run(size: Size, seed: int) -> list[Check]:
    """Flows between a picture, a question and the answer; at full size also between facts and a question."""
    checks = _pictures(size, seed)
    return checks + _text(seed) if size == "full" else checks


def _pictures(size: Size, seed: int) -> list[Check]:
    seeing, count = Seeing.open(size), 600 if size == "full" else 100
    layers, generator = len(seeing.stack), torch.Generator().manual_seed(2000 + seed)
    scenes = draw_two(seeing.world, count, generator)
    data = about_scenes(seeing.vocabulary, scenes, KINDS, random.Random(seed))
    right_N = seeing.right(data)
    asked_NP = scenes.patches_NP == _asked(seeing, data, scenes.things_NO)[:, None] + 1
    data, asked_NP = data.pick(right_N), asked_NP[right_N]
    if len(data) < 10:
        return [Check("flows", "ten right answers to look at", {"right answers": len(data), "of": count}, None, None,
                      "this small model answers too few questions")]
    trace, groups = seeing.trace(data), _groups(data.tokens_NT.shape[1], asked_NP, generator)
    width = round(9 * layers / 40)
    curves = _curves([trace], groups, range(layers), width)
    logs = {name: min(curve) for name, curve in _curves([trace], {name: groups[name] for name in THREE}, range(layers),
                                                        width, how="log").items()}
    least = {name: min(curve) for name, curve in curves.items()}
    three = {name: groups[name] for name in THREE}
    widths = {
        f"{k} layers": {name: min(curve) for name, curve in _curves([trace], three, range(layers), k).items()}
        for k in (1, 3, 5)
    }
    shared = {"right answers": len(data), "of": count, "window": width}
    return [
        _order("the picture reaches the question before the question reaches the end", "image -> question",
               "question -> last", curves, ("first token -> question", "last -> last"), shared, DIRECT),
        Check(
            name="the picture hardly reaches the last position itself",
            claim="the largest loss from cutting image -> last is smaller than from image -> question and from "
            "question -> last (published: 5 %, 60 %, 30 %)",
            measured={name: least[name] for name in THREE} | {"nats of the answer's log-probability": logs},
            control={"last -> last": least["last -> last"], "by width of the window": widths},
            holds=least["image -> last"] > max(least["image -> question"], least["question -> last"]),
            why="change of the answer's probability in percent, at the centre where it is lowest; a gain from nearly "
            "nothing would weigh much in percent, so the mean change of its logarithm is given too. " + DIRECT,
        ),
        Check(
            name="within the picture the asked object matters",
            claim="cutting the asked object's patches from the question costs more than twice what as many other "
            "patches cost",
            measured={"object patches -> question": curves["object patches -> question"],
                      "all other patches -> question": curves["other patches -> question"]},
            control={"as many other patches -> question": curves["as many other patches -> question"]},
            holds=least["object patches -> question"] < 2 * min(0.0, least["as many other patches -> question"]),
            why="change in percent by the window's centre. An encoder that mixes patches may put an object into others",
        ),
    ]


def _asked(seeing: Seeing, data: SceneData, things_NO: Tensor) -> Tensor:
    """Which of the two things a question names, 0 or 1, [N]."""
    names_NO = seeing.vocabulary.names_E[things_NO]
    return (names_NO[:, 1:] == data.tokens_NT).any(1).long()


def _groups(length: int, asked_NP: Tensor, generator: torch.Generator) -> Groups:
    """The flows, each a source and a target."""
    image, last = positions(length, PICTURE), positions(length, length - 1)
    question = positions(length, slice(PICTURE.stop, length - 1))
    chosen = {"object": asked_NP, "other": ~asked_NP, "as many other": as_many(asked_NP, generator)}
    within = {f"{name} patches -> question": patches(length, rows_NP) for name, rows_NP in chosen.items()}
    return {
        "image -> question": (image, question), "question -> last": (question, last), "image -> last": (image, last),
        "last -> last": (last, last), "first token -> question": (positions(length, 0), question),
    } | {name: (source_NT, question.expand_as(source_NT)) for name, source_NT in within.items()}


def _curves(traces: Sequence[Trace], groups: Groups, centres: Sequence[int], width: int, *,
            how: Literal["percent", "log"] = "percent") -> Curves:
    """Mean change of the answer's probability in percent, or of its logarithm in nats, by flow and window's centre."""
    own = [trace.prediction().max(-1) for trace in traces]
    curves: Curves = {name: [] for name in groups}
    with Progress("cutting attention", len(groups) * len(centres)) as bar:
        for name, (source_BT, target_BT) in groups.items():
            for centre in centres:
                changes = []
                for trace, (before_B, answer_B) in zip(traces, own, strict=True):
                    cut = window(centre, width, len(trace.stack))
                    after_BV = trace.cut(source_BT, target_BT, cut)
                    after_B = after_BV.gather(1, answer_B[:, None])[:, 0]
                    changes.append(change(before_B, after_B) if how == "percent" else after_B - before_B)
                curves[name].append(round(float(torch.cat(changes).mean()), 2))
                bar.step()
    return curves


def _order(name: str, first: str, second: str, curves: Curves, controls: Sequence[str],
           shared: Mapping[str, object], reason: str, centres: Sequence[int] | None = None) -> Check:
    depths = {flow: depth(curves[flow], centres) for flow in (first, second, *controls)}
    a, b = depths[first], depths[second]
    return Check(
        name=name,
        claim=f"the mean depth of cuts that hurt, weighted by the loss, is smaller for {first} than for {second}",
        measured={**{flow: curves[flow] for flow in (first, second)}, "mean depths": [a, b], **shared},
        control={**{flow: curves[flow] for flow in controls}, "mean depths": [depths[flow] for flow in controls]},
        holds=a is not None and b is not None and a < b,
        why="lists are the change of the answer's probability in percent by centre of the window; gains are ignored. "
        + reason,
    )


def depth(curve: Sequence[float], centres: Sequence[int] | None = None) -> float | None:
    """Mean centre, weighted by the loss there; None where nothing is lost."""
    losses = [max(0.0, -value) for value in curve]
    places = range(len(curve)) if centres is None else centres
    total = sum(losses)
    return round(sum(k * loss for k, loss in zip(places, losses, strict=True)) / total, 2) if total else None


def _text(seed: int, items: int = 700, batch: int = 30, most: int = 120) -> list[Check]:
    """Facts, an example and a question in plain text: three things with colours, one of them asked for."""
    stack = lw.open("smollm2")
    tokenizer, draw = stack.tokenizer, random.Random(seed)
    assert tokenizer is not None
    texts, hues = zip(*[_prompt(draw) for _ in range(items)], strict=True)
    tokens_NT = torch.tensor([tokenizer.encode("".join(parts)) for parts in texts])
    hues_NK = torch.tensor([
        [single_token(tokenizer, f" {word}") for word in (hue, hue.capitalize(), other, other.capitalize())]
        for hue, other in hues
    ])
    found_N = torch.cat([Trace(stack, rows_BT).prediction().argmax(-1) for rows_BT in tokens_NT.split(batch)])
    right_N = found_N == hues_NK[:, 1]
    tokens_NT, hues_NK = tokens_NT[right_N][:most], hues_NK[right_N][:most]
    traces = [Trace(stack, rows_BT) for rows_BT in tokens_NT.split(batch)]
    length, first = tokens_NT.shape[1], len(tokenizer.encode(texts[0][0]))
    example = first + len(tokenizer.encode(texts[0][1]))
    facts, last = positions(length, slice(0, first)), positions(length, length - 1)
    question = positions(length, slice(example, length - 1))
    groups = {
        "facts -> question": (facts, question), "question -> last": (question, last), "facts -> last": (facts, last),
        "example -> question": (positions(length, slice(first, example)), question),
    }
    centres = range(2, len(stack), 5)
    curves = _curves(traces, groups, centres, round(9 * len(stack) / 40))
    shared = {"facts -> last": curves["facts -> last"], "right answers": int(right_N.sum()), "of": items,
              "centres": list(centres)}
    return [
        _order("in text, facts reach the question before the question reaches the end", "facts -> question",
               "question -> last", curves, ("example -> question",), shared, COPIED, centres),
        _letters(traces, hues_NK.split(batch)),
    ]


def _prompt(draw: random.Random) -> tuple[tuple[str, str, str], tuple[str, str]]:
    """Facts, example and question; the colour asked for and the third thing's, which nobody asks about."""
    things, hues = draw.sample(THINGS, 3), draw.sample(HUES, 3)
    order = draw.sample(range(3), 3)
    asked, shown, other = order
    facts = " ".join(f"The {thing} is {hue}." for thing, hue in zip(things, hues, strict=True))
    example = f"\nQuestion: What colour is the {things[shown]}? Answer: {hues[shown].capitalize()}"
    question = f"\nQuestion: What colour is the {things[asked]}? Answer:"
    return (facts, example, question), (hues[asked], hues[other])


def _letters(traces: Sequence[Trace], tracked: Sequence[Tensor]) -> Check:
    """Follow the answer in lower and upper case at the last position."""
    depths = range(len(traces[0].states))
    curves_KD = torch.stack([
        torch.cat([trace.prediction(d).gather(1, ids_BK).exp() for trace, ids_BK in zip(traces, tracked, strict=True)])
        .mean(0) for d in depths
    ]).T
    rounded = [[round(float(p), 4) for p in row_D] for row_D in curves_KD]
    lower, upper = int(curves_KD[0].argmax()), int(curves_KD[1].argmax())
    return Check(
        name="the answer appears in lower case first",
        claim="the probability of the lower-case answer is highest at an earlier depth than that of the capitalised "
        "one, and is the larger of the two there",
        measured={"depths of the peaks": [lower, upper], "lower case": rounded[0], "capitalised": rounded[1]},
        control={"lower case, thing not asked for": rounded[2], "capitalised, thing not asked for": rounded[3]},
        holds=lower < upper and bool(curves_KD[0, lower] > curves_KD[1, lower]),
        why="lens with the final norm at every depth, mean over right answers; the example in the prompt shows "
        "capitalised answers, the facts are in lower case",
    )
