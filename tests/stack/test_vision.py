"""A decoder that sees: where pictures enter, what is refused, and that it is saved and changed whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import layerwise as lw
from layerwise.data.batch import Batch
from layerwise.errors import BadFile, BadOption
from layerwise.measure.identity import identity
from layerwise.nets.vision import Vision, VisionSpec
from layerwise.stack.vision import VisionLanguageStack, is_vision_language, open_vision_language
from layerwise.testing.stacks import random_stack

IMAGE = 3


@pytest.fixture
def stack() -> VisionLanguageStack:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        vision = Vision(VisionSpec(16, (8, 12), 64))
    return VisionLanguageStack(random_stack().decoder, vision.requires_grad_(False), IMAGE)


def prompt(rows: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    words_BT = torch.randint(4, 97, (rows, 6), generator=generator)
    tokens_BT = torch.cat([words_BT[:, :2], torch.full((rows, 16), IMAGE), words_BT[:, 2:]], 1)
    return tokens_BT, torch.randint(256, (rows, 3, 16, 16), generator=generator, dtype=torch.uint8)


def test_pictures_enter_at_the_image_tokens_only(stack: VisionLanguageStack) -> None:
    tokens, pixels = prompt()
    hidden = stack.start(tokens, pixels_B3SS=pixels).hidden
    blind = stack.start(tokens).hidden
    assert torch.equal(hidden[:, 2:18], stack.vision(pixels))
    assert torch.equal(hidden[:, :2], blind[:, :2])
    assert torch.equal(hidden[:, 18:], blind[:, 18:])


def test_patches_are_in_reading_order(stack: VisionLanguageStack) -> None:
    """Another lower right corner changes the last patch and leaves the first, which is out of its reach."""
    _, pixels = prompt()
    other = pixels.clone()
    other[:, :, -1, -1] = 255 - other[:, :, -1, -1]
    stages = stack.vision.encoder
    before, after = (stages[0].halve(p.float()).flatten(2).transpose(1, 2) for p in (pixels, other))
    changed_P = (before != after).any(-1).any(0)
    assert changed_P.nonzero().flatten().tolist() == [63]


def test_rows_do_not_influence_each_other(stack: VisionLanguageStack) -> None:
    tokens, pixels = prompt()
    both = stack(tokens, pixels_B3SS=pixels)
    torch.testing.assert_close(stack(tokens[1:], pixels_B3SS=pixels[1:])[0], both[1], atol=1e-4, rtol=1e-4)


def test_pictures_that_do_not_fit_are_refused(stack: VisionLanguageStack) -> None:
    tokens, pixels = prompt()
    with pytest.raises(BadOption, match="image tokens"):
        stack.start(tokens[:, 3:], pixels_B3SS=pixels)
    with pytest.raises(BadOption, match="1 pictures for 2 rows"):
        stack.start(tokens, pixels_B3SS=pixels[:1])


def test_a_saved_folder_opens_again_with_eyes(stack: VisionLanguageStack, tmp_path: Path) -> None:
    tokens, pixels = prompt()
    folder = stack.save(tmp_path / "seeing")
    assert is_vision_language(folder)
    found = lw.open(folder)
    assert isinstance(found, VisionLanguageStack)
    assert found.name == "seeing"
    torch.testing.assert_close(found(tokens, pixels_B3SS=pixels), stack(tokens, pixels_B3SS=pixels))
    assert identity(found) == identity(stack)
    assert not is_vision_language(folder / "decoder")
    torch.testing.assert_close(lw.open(folder / "decoder")(tokens), stack(tokens))


def test_a_damaged_folder_is_refused(stack: VisionLanguageStack, tmp_path: Path) -> None:
    folder = stack.save(tmp_path / "seeing")
    weights = folder / "vision" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(BadFile, match="truncated"):
        open_vision_language(folder)
    (stack.save(folder) / "config.json").write_text('{"model_type": "layerwise-vision-language"}')
    with pytest.raises(BadFile, match=r"config\.json"):
        lw.open(folder)


def test_other_eyes_are_another_model(stack: VisionLanguageStack) -> None:
    before = identity(stack)
    stack.vision.projector[0].weight.data[0, 0] += 1
    assert identity(stack) != before


def test_changed_stacks_still_see(stack: VisionLanguageStack) -> None:
    tokens, pixels = prompt()
    with stack.skip(2):
        expected = stack(tokens, pixels_B3SS=pixels)
    kept = [stack.block(layer) for layer in (0, 1, 3)]
    shorter = stack.rebuilt(stack.spec.with_rows({2: None}), kept)
    torch.testing.assert_close(shorter(tokens, pixels_B3SS=pixels), expected)
    twin = stack.copied(torch.float64)
    twin.vision.projector[0].weight.data.zero_()
    assert bool(stack.vision.projector[0].weight.any())
    assert twin(tokens, pixels_B3SS=pixels).dtype == torch.float64


def test_instruments_see_the_pictures(stack: VisionLanguageStack) -> None:
    tokens, pixels = prompt()
    seeing, blind = (
        lw.measure(stack, [Batch(tokens, inputs=inputs)], ["block-influence", "leave-one-out"], progress=False)
        for inputs in ({"pixels_B3SS": pixels}, {})
    )
    state, values = stack.start(tokens, pixels_B3SS=pixels), []
    for layer in range(len(stack)):
        after = stack.run(state, slice(layer, layer + 1))
        cosine = torch.cosine_similarity(state.hidden.double(), after.hidden.double(), dim=-1)
        values.append(float((1 - cosine).mean()))
        state = after
    assert seeing["block-influence"].values == pytest.approx(values, rel=1e-5)
    assert seeing["block-influence"].values != pytest.approx(blind["block-influence"].values, rel=1e-3)
    assert seeing.provenance["sample"] != blind.provenance["sample"]
