"""A small vision-language model trained from nothing on drawn scenes, in minutes on one core.

Four stages, in the order in which large ones are made: a decoder reads text about a world (`data/scenes.py`);
an encoder learns to tell things and colours apart; a projector learns to name what the encoder sees while the
decoder stays as it is; projector and decoder are tuned on questions about pictures, with text in between.

Facts are asked about pictures of the first half of the things only. Of the others the model has read the
facts and learned to name the pictures, and was never asked about a fact with a picture before it.

Every stage keeps its state on disk, so that a killed training goes on where it was and ends with the same weights.

Shapes: N rows, B rows of a batch, T tokens, P patches, V vocabulary.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.data.scene_text import (
    BEGIN,
    IMAGE,
    SPECIAL,
    UNKNOWN,
    Kind,
    SceneData,
    Vocabulary,
    about_scenes,
    plain_text,
)
from layerwise.data.scenes import COLOURS, SIDE, Scenes, World, draw_one, draw_two
from layerwise.errors import BadData
from layerwise.io.tokenizer import Tokenizer, read_json
from layerwise.measure.progress import Progress
from layerwise.nets.vision import Vision, VisionSpec
from layerwise.places import cache_folder
from layerwise.spec import Attention, FeedForward, LayerSpec, StackSpec
from layerwise.stack.vision import VisionLanguageStack, is_vision_language
from layerwise.train.checkpoint import Checkpoint, digest
from layerwise.train.fresh import fresh
from layerwise.train.loop import Recipe, train

LINE = 32
"""Tokens of a row of text."""

PAIRS: tuple[Kind, ...] = ("side name", "colour", "side")


@dataclass(frozen=True)
class Training:
    """Sizes and steps of the four stages. `pictures` of each kind are drawn once; batches are rows of them."""

    things: int = 64
    layers: int = 8
    hidden: int = 64
    widths: tuple[int, ...] = (24, 48, 64)
    read: int = 600
    see: int = 600
    align: int = 200
    tune: int = 900
    pictures: int = 8192
    batch: int = 64
    rate: float = 6e-3
    seed: int = 0

    @property
    def world(self) -> World:
        return World(self.things, self.seed)

    @property
    def steps(self) -> int:
        return self.read + self.see + self.align + self.tune


SMALL = Training(things=8, layers=4, hidden=32, widths=(16, 24, 32), read=120, see=250, align=40, tune=120,
                 pictures=1024, batch=32)
"""Seconds instead of minutes, and far less able: to try things on."""

DEMOS = {"tiny-vlm": Training(), "tiny-vlm-quick": SMALL}


def demo(name: str) -> Path:
    """The folder of the demo called `name`, in the cache; trained and saved there where it is not yet.

    What a killed training left in `<name>.training` is taken up.
    """
    from filelock import FileLock

    folder = cache_folder() / "models" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not _is_kept(folder, DEMOS[name]):
            states = folder.with_suffix(".training")
            how = "going on with its training" if states.exists() else "training it"
            print(f"{name}: {how} on drawn scenes (once, kept in {folder})", file=sys.stderr, flush=True)
            _save(make(DEMOS[name], states), DEMOS[name], folder)
            shutil.rmtree(states, ignore_errors=True)
    return folder


def _is_kept(folder: Path, training: Training) -> bool:
    """Whether the folder holds a model of just this training, and not one of an earlier version."""
    if not is_vision_language(folder):
        return False
    notes: object = read_json(folder / "config.json").get("notes")
    return bool(notes == json.loads(json.dumps(asdict(training))))


def _save(stack: VisionLanguageStack, training: Training, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as assets:
        write_tokenizer(Vocabulary(training.world), Path(assets))
        stack.tokenizer = Tokenizer(assets)
        stack.save(folder, notes=asdict(training))


def examples(stack: VisionLanguageStack, count: int, seed: int) -> SceneData:
    """Questions about new pictures of two things, for measuring a demo on. Raises BadData for another model."""
    if stack.name not in DEMOS:
        raise BadData(f"{stack.name}, of whose world nothing is known", expected=f"one of {', '.join(DEMOS)}",
                      do="give batches with pixels_B3SS, or text")
    vocabulary, draw = Vocabulary(DEMOS[stack.name].world), random.Random(seed)
    scenes = draw_two(vocabulary.world, count, torch.Generator().manual_seed(3000 + seed))
    return about_scenes(vocabulary, scenes, PAIRS, draw)


class Course:
    """The stages of a training, one after another: progress over all of them, and with `states` a checkpoint each."""

    def __init__(self, training: Training, states: Path | None, bar: Progress) -> None:
        self.training, self.states, self.bar = training, states, bar

    def stage(self, name: str, parameters: Sequence[nn.Parameter], loss: Callable[[Tensor], Tensor], rows_N: Tensor,
              steps: int, scale: float = 1.0) -> None:
        """Train `parameters` for `steps`, or take up what a killed training left of it."""
        shown = 0

        def show(done: int) -> None:
            nonlocal shown
            self.bar.step(done - shown)
            shown = done

        kept = None
        if self.states is not None:
            identity = digest(asdict(self.training))
            kept = Checkpoint(self.states / identity / name, identity, end=True)
        train(parameters, loss, rows_N, _recipe(self.training, steps, scale), after=[show], checkpoint=kept)
        show(steps)


def make(training: Training, states: Path | None = None) -> VisionLanguageStack:
    """Train from nothing: reading, seeing, aligning, tuning. `states` is the folder that makes it resumable."""
    vocabulary = Vocabulary(training.world)
    generator = torch.Generator().manual_seed(training.seed)
    stack = _blank(training, vocabulary)
    with torch.random.fork_rng([]), Progress("training the vision-language model", training.steps) as bar:
        course = Course(training, states, bar)
        _read(stack, vocabulary, course)
        one, two = _pictures(training, generator)
        _see(stack.vision, course, one, two)
        _look(stack, vocabulary, course, one, two)
    stack.decoder.requires_grad_(False).eval()
    stack.vision.requires_grad_(False).eval()
    return stack


def _blank(training: Training, vocabulary: Vocabulary) -> VisionLanguageStack:
    hidden = training.hidden
    row = LayerSpec(Attention(heads=4, kv_heads=4, head_dim=hidden // 4), FeedForward(width=3 * hidden))
    spec = StackSpec("llama", hidden, len(vocabulary), (row,) * training.layers, dtype="float32", context=128)
    with torch.random.fork_rng([]):
        torch.manual_seed(training.seed)
        vision = Vision(VisionSpec(SIDE, training.widths, hidden))
    return VisionLanguageStack(fresh(spec, training.seed).decoder, vision, IMAGE)


def _pictures(training: Training, generator: torch.Generator) -> tuple[Scenes, Scenes]:
    things_N = torch.randint(training.things, (training.pictures,), generator=generator)
    return (draw_one(training.world, things_N, generator),
            draw_two(training.world, training.pictures, generator))


def _read(stack: VisionLanguageStack, vocabulary: Vocabulary, course: Course) -> None:
    training = course.training
    text_NT = plain_text(vocabulary, training.batch * min(training.read, 400), LINE, training.seed)
    stack.decoder.requires_grad_(True).train()

    def loss(tokens_BT: Tensor) -> Tensor:
        return _reading_loss(stack, tokens_BT, vocabulary.ids["?"])

    course.stage("read", list(stack.decoder.parameters()), loss, text_NT, training.read)


def _see(vision: Vision, course: Course, one: Scenes, two: Scenes) -> None:
    """Every patch tells the thing and the colour whose box covers its centre; the readout is thrown away."""
    training = course.training
    classes = (training.things + 1, len(COLOURS) + 1)
    with torch.random.fork_rng([]):
        torch.manual_seed(training.seed)
        readout = nn.Linear(training.widths[-1], sum(classes))
    scenes = _joined(one, two)
    things_NP, colours_NP = (_per_patch(scenes, kind_NO) for kind_NO in (scenes.things_NO, scenes.colours_NO))

    def loss(rows_B: Tensor) -> Tensor:
        things_BPE, colours_BPC = readout(vision.encode(scenes.pixels_N3SS[rows_B])).split(classes, -1)
        return (F.cross_entropy(things_BPE.flatten(0, 1), things_NP[rows_B].flatten())
                + F.cross_entropy(colours_BPC.flatten(0, 1), colours_NP[rows_B].flatten()))

    parameters = [*vision.encoder.parameters(), *readout.parameters()]
    course.stage("see", parameters, loss, torch.arange(len(scenes)), training.see)
    vision.encoder.requires_grad_(False)


def _look(stack: VisionLanguageStack, vocabulary: Vocabulary, course: Course, one: Scenes, two: Scenes) -> None:
    """Align the projector alone, then tune projector and decoder on everything."""
    training = course.training
    draw, half = random.Random(training.seed), training.things // 2
    told = one.pick(one.things_NO[:, 0] < half)
    pairs = _rows(about_scenes(vocabulary, two, PAIRS, draw, turns=3))
    single = _rows(about_scenes(vocabulary, one, ("name",), draw), about_scenes(vocabulary, told, ("fact",), draw))
    text_NT = plain_text(vocabulary, training.batch * 100, LINE, training.seed + 1)
    asks = vocabulary.ids["?"]

    def aligned(rows_B: Tensor) -> Tensor:
        named_B = rows_B[: len(rows_B) // 2] % len(one)
        return _answer_loss(stack, pairs, rows_B, asks) + _answer_loss(stack, single, named_B, asks)

    def tuned(rows_B: Tensor) -> Tensor:
        asked = _answer_loss(stack, pairs, rows_B % len(two), asks)
        alone = _answer_loss(stack, single, rows_B[: len(rows_B) // 2], asks)
        return asked + alone + _reading_loss(stack, text_NT[rows_B[: len(rows_B) // 3] % len(text_NT)], asks)

    stack.decoder.requires_grad_(False)
    projector = list(stack.vision.projector.parameters())
    course.stage("align", projector, aligned, torch.arange(len(two)), training.align)
    stack.decoder.requires_grad_(True)
    rows = torch.arange(len(single[0]))
    course.stage("tune", [*projector, *stack.decoder.parameters()], tuned, rows, training.tune, 0.5)


def _rows(*parts: SceneData) -> tuple[Tensor, Tensor]:
    """Tokens with their last answers, and pictures."""
    tokens, pixels = [], []
    for part in parts:
        assert part.answers_N is not None
        assert part.pixels_N3SS is not None
        tokens.append(torch.cat([part.tokens_NT, part.answers_N[:, None]], 1))
        pixels.append(part.pixels_N3SS)
    return torch.cat(tokens), torch.cat(pixels)


def _reading_loss(stack: VisionLanguageStack, tokens_BT: Tensor, asks: int) -> Tensor:
    """Cross-entropy of the next token, and once more of what follows every question mark, nats."""
    logits_BTV, next_BT = stack(tokens_BT)[:, :-1], tokens_BT[:, 1:]
    asked_BT = tokens_BT[:, :-1] == asks
    everything = F.cross_entropy(logits_BTV.flatten(0, 1), next_BT.flatten())
    return everything + F.cross_entropy(logits_BTV[asked_BT], next_BT[asked_BT])


def _answer_loss(stack: VisionLanguageStack, data: tuple[Tensor, Tensor], rows_B: Tensor, asks: int) -> Tensor:
    """Cross-entropy of what follows every question mark, nats."""
    tokens_BT, pixels_B3SS = data[0][rows_B], data[1][rows_B]
    state = stack.run(stack.start(tokens_BT[:, :-1], pixels_B3SS=pixels_B3SS))
    asked_BT = tokens_BT[:, :-1] == asks
    logits_AV = stack.finish(state.moved(state.hidden[asked_BT][None], state.layer))[0]
    return F.cross_entropy(logits_AV, tokens_BT[:, 1:][asked_BT])


def _per_patch(scenes: Scenes, kind_NO: Tensor) -> Tensor:
    """The class of what lies on each patch, 0 for the ground, [N, P]."""
    padded_NO = torch.cat([torch.zeros_like(kind_NO[:, :1]), kind_NO + 1], 1)
    return padded_NO.gather(1, scenes.patches_NP)


def _joined(a: Scenes, b: Scenes) -> Scenes:
    return Scenes(*(torch.cat([getattr(a, f.name), getattr(b, f.name)]) for f in fields(Scenes)))


def _recipe(training: Training, steps: int, scale: float) -> Recipe:
    return Recipe(steps, training.batch, scale * training.rate, warmup=max(1, steps // 20), seed=training.seed)


def write_tokenizer(vocabulary: Vocabulary, folder: Path) -> None:
    """A tokenizer of whole words, in the format that `Tokenizer` reads."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import models, pre_tokenizers, processors

    fast = Fast(models.WordLevel(vocabulary.ids, unk_token=SPECIAL[UNKNOWN]))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    begin = SPECIAL[BEGIN]
    fast.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, BEGIN)])
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": begin}) + "\n", encoding="utf-8")
