"""Healing as a step of a run: text that nothing else reads, a state on disk, a record for the report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from layerwise.allocate.plan import Plan
from layerwise.data.text import TextData, text_blocks
from layerwise.errors import BadData, BadFile
from layerwise.io import atomic
from layerwise.report.layers import kept_layers
from layerwise.report.run import Run
from layerwise.stack.base import Stack
from layerwise.stack.decoder import DecoderStack
from layerwise.stack.open import open
from layerwise.train.checkpoint import Checkpoint
from layerwise.train.duration import Duration
from layerwise.train.heal import Healed, defaults, distil
from layerwise.train.healing import Healing
from layerwise.train.methods import Layers

JUDGED = 4
"""Blocks, at most, that choose the best state and say whether healing helped."""

MOST = 4096
"""Blocks of text to heal on, at most."""


def heal_in(run: Run, stack: DecoderStack, model: Path, plan: Plan, calibration: TextData, source: str | Path,
            duration: Duration, seed: int, tell: Callable[[str], None]) -> Path:
    """The step "healed" of a run: the folder of the healed model, and beside it `healing.json`.

    A killed healing goes on from its last state in `healing/`. Raises what healing raises.
    """
    def produce() -> Healed:
        tell(f"healing for {duration}, on text that neither measured nor verifies")
        return _healed(run, stack, open(model), plan, calibration, source, duration, seed)

    def save(healed: Healed, path: Path) -> None:
        save_healing(healed.healing, run.path("healing.json"))
        healed.stack.save(path)

    folder = run.step("healed", produce, file="healed", save=save, load=lambda path: path)
    Checkpoint(run.path("healing"), "").remove()
    tell(str(load_healing(run.path("healing.json"))))
    return folder


def text_to_heal(stack: DecoderStack, source: str | Path, used: TextData, seed: int) -> tuple[TextData, TextData]:
    """Blocks to train on and blocks to judge by, of the calibration split and none of them in `used`.

    Where `used` leaves fewer than two, its own blocks serve; verification text never does. Raises BadData without a
    tokenizer, or with a single block of text.
    """
    if stack.tokenizer is None:
        raise BadData(f"{stack.name}, which has no tokenizer", expected="a model folder with tokenizer files",
                      do="put the tokenizer files that came with the model into its folder")
    whole = text_blocks(source, stack.tokenizer, length=used.length, split="calibration", seed=None)
    taken = set(used.source.chosen)
    left = [row for row in range(len(whole)) if row not in taken]
    rows = left if len(left) > 1 else list(range(len(whole)))
    if len(rows) < 2:
        raise BadData(f"one block of {used.length} tokens to heal on", expected="at least two, one of them to judge by",
                      do="give more text")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:MOST].tolist()
    judged = min(JUDGED, max(1, len(order) // 4))
    return whole.rows([rows[place] for place in order[judged:]]), whole.rows([rows[place] for place in order[:judged]])


def save_healing(healing: Healing, path: Path) -> None:
    atomic.write_text(path, json.dumps(healing.to_json(), indent=1) + "\n")


def load_healing(path: Path) -> Healing:
    """Read what `save_healing` wrote. Raises BadFile where it is missing or damaged."""
    try:
        return Healing.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise BadFile(f"the record of healing in {path}: {error}", expected="a file written by this command",
                      do="use --fresh") from error


def _healed(run: Run, stack: DecoderStack, slim: Stack, plan: Plan, calibration: TextData,
            source: str | Path, duration: Duration, seed: int) -> Healed:
    assert isinstance(slim, DecoderStack)
    text, held = text_to_heal(stack, source, calibration, seed)
    recipe = defaults(slim, Layers(), duration, seed=seed)
    return distil(slim, stack, text.tokens_NT, held.tokens_NT, kept_layers(stack.spec, plan), Layers(), recipe,
                  folder=run.path("healing"))
