"""How Do Training Methods Influence the Utilization of Vision Models? (arXiv 2410.14470)

Claims, over 50 ResNet-50 checkpoints that differ only in training: adversarial training makes nearly every layer
critical (mean 83 % against 70 %), better recipes (50 %) and self-supervision (55 %) leave more layers idle, and the
stem and the classifier are always critical (about 95 %).

From the official code: one fresh network a draw, every convolution and linear layer in turn gets its tensors, 1 -
mean cosine of class probabilities on fixed images; its comparison of two sets of logits gives our number exactly.
Difference found: that code also resets batch norms; its published table lists convolutions and the classifier only,
which is what is done here. Ours: a residual network that is too deep for drawn digits, four kinds of training,
rotation prediction as self-supervision, training on noise as large as the attack as control, and pretrained CIFAR-10
networks where the data folder holds them. Batch norms are not recalibrated, as in the paper.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean, stdev

import torch
from safetensors.torch import load_file
from scipy.stats import kendalltau, spearmanr
from torch import Tensor, nn

import layerwise as lw
from layerwise.data.glyphs import glyphs
from layerwise.data.images import ImageData
from layerwise.data.labelled import Labelled, loaded
from layerwise.data.sources import data_folder
from layerwise.measure.perturbation import criticality, disagreement, perturb, total_variation
from layerwise.nets.classifiers import ResNet
from layerwise.stack.perturb import reset, zero
from layerwise.systems.base import Check, Size
from layerwise.train.attack import PGD, GaussianNoise, classification_loss
from layerwise.train.classify import Loss, accuracy, against, augmented, fit, plain, seeded
from layerwise.train.loop import Recipe


@dataclass(frozen=True)
class Scale:
    depth: int
    widths: tuple[int, ...]
    steps: int
    images: int
    draws: int
    eps: tuple[float, ...]


SCALES = {
    "quick": Scale(2, (4, 8), 50, 200, 2, (0.06,)),
    "full": Scale(3, (8, 16, 32), 300, 300, 5, (0.04, 0.08)),
}


@dataclass(frozen=True)
class Scan:
    """Criticality of every part, mean over draws, and the mean over parts of every draw."""

    parts: dict[str, float]
    draws: list[float]
    disagreement: float
    variation: float
    zeroed: float | None = None

    @property
    def mean(self) -> float:
        return mean(self.draws)

    def above(self, other: Scan) -> float:
        """How many standard errors this mean is above another's."""
        error = math.sqrt((stdev(self.draws) ** 2 + stdev(other.draws) ** 2) / len(self.draws))
        return (self.mean - other.mean) / error

    def shown(self) -> dict[str, float]:
        stages: dict[str, list[float]] = {}
        for path, value in self.parts.items():
            stages.setdefault(path.split(".")[0], []).append(value)
        return {"mean": round(self.mean, 3), **{stage: round(mean(found), 3) for stage, found in stages.items()},
                "disagreement": round(self.disagreement, 3), "total variation": round(self.variation, 3)} | (
                    {} if self.zeroed is None else {"weights zero instead": round(self.zeroed, 3)})


def run(size: Size, seed: int) -> list[Check]:
    """Networks under four kinds of training, and pretrained ones; every layer re-initialised in each."""
    scale = SCALES[size]
    test = glyphs(scale.images, seed + 500, side=12)
    networks = _trained(scale, seed)

    def build() -> ResNet:
        return ResNet(scale.depth, scale.widths, channels=1)

    scans = {name: scan(net, build, test, scale.draws, seed, zeros=name == "plain") for name, net in networks.items()}
    scores = {name: round(accuracy(net, test), 3) for name, net in networks.items()}
    checks = [_adversarial(scans, scores, size), _rising(scans, scores, size), _idle(scans, scores, size),
              _self_supervised(scans, scores, size), _ends({"plain": scans["plain"]}, "digits", size)]
    folder = data_folder()
    if size == "full" and folder is not None and (folder / "cifar10-resnets").is_dir():
        pretrained = {f"ResNet-{6 * depth + 2}": _pretrained(depth, seed) for depth in (3, 9)}
        checks.append(_ends(pretrained, "CIFAR-10", size))
    return checks


def scan(net: nn.Module, build: Callable[[], nn.Module], test: Labelled, draws: int, seed: int, *,
         zeros: bool = False) -> Scan:
    """Criticality of every convolution and linear layer against `draws` fresh networks, and against zeros."""
    fresh = {str(draw): reset(seeded(build, 1000 * (seed + 1) + draw).state_dict()) for draw in range(draws)}
    found = perturb(lw.open(net), test, fresh | ({"zero": zero} if zeros else {}),
                    {"criticality": criticality, "disagreement": disagreement, "variation": total_variation})
    zeroed = mean(values.pop("zero")["criticality"] for values in found.values()) if zeros else None
    by_draw = [mean(values[draw]["criticality"] for values in found.values()) for draw in fresh]
    apart, moved = (mean(value[kind] for values in found.values() for value in values.values())
                    for kind in ("disagreement", "variation"))
    return Scan({path: mean(value["criticality"] for value in values.values()) for path, values in found.items()},
                by_draw, apart, moved, zeroed)


def _trained(scale: Scale, seed: int) -> dict[str, nn.Module]:
    data = glyphs(2000, seed + 1, side=12)

    def fitted(loss: Loss, steps: float = 1.0, start: int = seed) -> ResNet:
        net = seeded(lambda: ResNet(scale.depth, scale.widths, channels=1), start)
        fit(net, data, Recipe(round(steps * scale.steps), batch=64, learning_rate=3e-3, warmup=20, seed=start), loss)
        assert isinstance(net, ResNet)
        return net

    def attack(eps: float) -> PGD:
        return PGD(eps, steps=3, rate=0.5, seed=None)

    pretrained = fitted(_turns(seed))
    with torch.inference_mode():
        features_NF = torch.cat([pretrained.features(x_B) for x_B in data])
    pretrained.linear = nn.Linear(scale.widths[-1], 10)
    seen = Labelled(features_NF.clone(), data.labels_N, 10, "features")
    fit(pretrained.linear, seen, Recipe(scale.steps, batch=64, learning_rate=1e-2, seed=seed))
    return {
        "plain": fitted(plain),
        "plain, other seed": fitted(plain, start=seed + 100),
        "improved": fitted(augmented(_vary, seed, smooth=0.1), steps=3),
        "self-supervised": pretrained.eval(),
        "noise": fitted(against(GaussianNoise(attack(scale.eps[-1]), None))),
        **{f"adversarial {eps}": fitted(against(attack(eps))) for eps in scale.eps},
    }


def _vary(x_B: Tensor, generator: torch.Generator) -> Tensor:
    """Shift by up to a pixel, blank a patch of four by four, add noise."""
    down, right, top, left = torch.randint(0, 9, (4,), generator=generator).tolist()
    x_B = x_B.roll((down % 3 - 1, right % 3 - 1), (2, 3)).clone()
    x_B[:, :, top : top + 4, left : left + 4] = 0
    return x_B + 0.1 * torch.randn(x_B.shape, generator=generator)


def _turns(seed: int) -> Loss:
    """Which of four quarter turns a picture has had: needs no labels."""
    generator = torch.Generator().manual_seed(seed)

    def loss(model: nn.Module, x_B: Tensor, _: Tensor) -> Tensor:
        turns_B = torch.randint(0, 4, (len(x_B),), generator=generator)
        turned_B = torch.stack([x.rot90(int(turn), (1, 2)) for x, turn in zip(x_B, turns_B, strict=True)])
        return classification_loss(model(turned_B)[:, :4], turns_B)

    return loss


def _adversarial(scans: dict[str, Scan], scores: dict[str, float], size: Size) -> Check:
    largest = scans[f"adversarial {SCALES[size].eps[-1]}"]
    return Check(
        name="adversarial training makes layers critical",
        claim="mean criticality after adversarial training is above plain training's by more than two standard errors "
        "(published means: 83 % against 70 %)",
        measured={"standard errors above plain": round(largest.above(scans["plain"]), 2),
                  **{name: scans[name].shown() | {"accuracy": scores[name]} for name in scans}},
        control={"standard errors of another plain run above plain":
                 round(scans["plain, other seed"].above(scans["plain"]), 2),
                 "of training on equally large noise": round(scans["noise"].above(scans["plain"]), 2)},
        holds=largest.above(scans["plain"]) > 2 if size == "full" else None,
        why="standard errors are over draws of the fresh network and do not see differences between training runs; "
        "the second plain run shows how large those are. Every layer of a network this deep for drawn digits has "
        "stand-ins; under attack the early stages, not the late ones, lose criticality, and predictions agree more as "
        "well, so that it is not only that attacked networks are less certain. Quick trains too little to tell",
    )


def _with_accuracy(scans: dict[str, Scan], scores: dict[str, float], names: list[str]) -> dict[str, float]:
    """Rank correlations of mean criticality and accuracy over networks."""
    pairs = [scans[name].mean for name in names], [scores[name] for name in names]
    return {"Spearman": round(float(spearmanr(*pairs).statistic), 3),
            "Kendall": round(float(kendalltau(*pairs).statistic), 3)}


def _rising(scans: dict[str, Scan], scores: dict[str, float], size: Size) -> Check:
    scale = SCALES[size]
    calm = [name for name in scans if not name.startswith("adversarial")]
    means = [scans["plain"].mean, *(scans[f"adversarial {eps}"].mean for eps in scale.eps)]
    return Check(
        name="criticality rises with the attack",
        claim="mean criticality rises with every step of the attack's size",
        measured={**dict(zip(["0", *map(str, scale.eps)], [round(value, 3) for value in means], strict=True)),
                  "with accuracy": {"all networks": _with_accuracy(scans, scores, list(scans)),
                                    "without adversarial ones": _with_accuracy(scans, scores, calm)}},
        control={"another plain run": round(scans["plain, other seed"].mean, 3),
                 "equally large noise": round(scans["noise"].mean, 3)},
        holds=all(a < b for a, b in itertools.pairwise(means)) if size == "full" else None,
        why="every size must be above the one before; in random order that happens once in "
        f"{math.factorial(len(means))}. Correlations with accuracy on clean images are given for comparison",
    )


def _idle(scans: dict[str, Scan], scores: dict[str, float], size: Size) -> Check:
    idle = {name: round(mean(value < 0.5 for value in found.parts.values()), 3) for name, found in scans.items()}
    return Check(
        name="an improved recipe leaves layers idle",
        claim="a third of the layers or more has criticality below 0.5 after the improved recipe, and its mean is "
        "below plain training's (published: 50 % against 70 %)",
        measured={"share below 0.5": idle["improved"], "mean": round(scans["improved"].mean, 3),
                  "accuracy": scores["improved"]},
        control={"plain": idle["plain"], "plain mean": round(scans["plain"].mean, 3), "accuracy": scores["plain"],
                 "another plain run": idle["plain, other seed"]},
        holds=idle["improved"] >= 1 / 3 and scans["improved"].mean < scans["plain"].mean if size == "full" else None,
        why="three times the steps, shifted, blanked and noisy inputs, smoothed labels. Smoothing makes probability "
        "vectors flatter, which lowers the cosine distance whatever the layer does. Quick trains too little",
    )


def _self_supervised(scans: dict[str, Scan], scores: dict[str, float], size: Size) -> Check:
    below = -scans["self-supervised"].above(scans["plain"])
    return Check(
        name="self-supervision leaves layers idle",
        claim="mean criticality after self-supervised training and a linear probe is below plain training's by more "
        "than two standard errors (published means: 55 % against 70 %)",
        measured={"standard errors below plain": round(below, 2), "mean": round(scans["self-supervised"].mean, 3),
                  "accuracy": scores["self-supervised"]},
        control={"another plain run": round(-scans["plain, other seed"].above(scans["plain"]), 2)},
        holds=below > 2 if size == "full" else None,
        why="rotation prediction on the same pictures stands for contrastive training on a million; its probe reads "
        "less than half of the digits, so its features are poor. Quick trains too little",
    )


def _ends(scans: dict[str, Scan], data: str, size: Size) -> Check:
    ends = {name: {path: round(found.parts[path], 3) for path in ("conv1", "linear")} for name, found in scans.items()}
    return Check(
        name=f"stem and classifier are critical ({data})",
        claim="the first convolution and the classifier both have criticality above 0.8 (published: about 0.95)",
        measured=ends,
        control={name: found.shown() for name, found in scans.items()},
        holds=all(value > 0.8 for pair in ends.values() for value in pair.values()) if size == "full" else None,
        why="the control is the mean over all layers and by stage, which the two stand out from. A fresh classifier "
        "answers evenly, and the cosine of a certain answer with an even one over K classes is 1 / sqrt(K): its "
        "criticality ends at 0.68 for 10 classes and at 0.97 for the 1,000 of the paper, so the threshold asks more "
        "here than there",
    )


def _pretrained(depth: int, seed: int) -> Scan:
    """A CIFAR-10 ResNet of 6 depth + 2 layers on 100 test images."""
    folder = data_folder()
    assert folder is not None
    net = ResNet(depth, (16, 32, 64))
    net.load_state_dict(load_file(folder / f"cifar10-resnets/resnet{6 * depth + 2}.safetensors"), strict=False)
    images = ImageData.from_npz(folder / "cifar10/test.npz", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    return scan(net.eval(), lambda: ResNet(depth, (16, 32, 64)), loaded(images.take(100, seed)), 2, seed)
