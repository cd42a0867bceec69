"""A decoder that also sees: an image encoder and a projector put vectors where the prompt has image tokens.

    state = stack.start(tokens_BT, pixels_B3SS=pixels)    # every picture fills the image tokens of its row

Layers are the decoder's, so everything that works on a decoder works here. `stack.vision` is a module that
`layerwise.open` opens by itself.

Shapes: B rows, T tokens, S pixels a side, P patches, C hidden width.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from layerwise.errors import BadFile, BadOption
from layerwise.io import atomic, manifest
from layerwise.io.safetensors import SafetensorsCheckpoint, write
from layerwise.io.save import save
from layerwise.io.source import read
from layerwise.io.tokenizer import read_json
from layerwise.nets.decoder import Decoder
from layerwise.nets.vision import Vision, VisionSpec
from layerwise.spec import StackSpec
from layerwise.stack.base import State
from layerwise.stack.decoder import DecoderStack, load

if TYPE_CHECKING:
    from layerwise.io.tokenizer import Tokenizer

KIND = "layerwise-vision-language"
"""`model_type` in the `config.json` of a saved folder."""


class VisionLanguageStack(DecoderStack):
    """A decoder with eyes. `image_token` is the id that `vision` replaces, once for every patch."""

    def __init__(self, decoder: Decoder, vision: Vision, image_token: int, *, name: str = "vision-language",
                 tokenizer: Tokenizer | None = None, folder: Path | None = None) -> None:
        super().__init__(decoder, name=name, tokenizer=tokenizer, folder=folder)
        self.vision, self.image_token = vision, image_token

    def start(self, tokens_BT: Tensor, mask_BT: Tensor | None = None, *, pixels_B3SS: Tensor | None = None,
              **options: Any) -> State:
        """As `DecoderStack.start`; `pixels_B3SS` is one picture a row, uint8. Without it this is a text model.

        Raises BadOption where a row has not one image token for every patch.
        """
        state = super().start(tokens_BT, mask_BT, **options)
        if pixels_B3SS is None:
            return state
        here_BT = (tokens_BT == self.image_token).to(state.hidden.device)
        patches = self.vision.spec.patches
        if len(pixels_B3SS) != len(tokens_BT) or bool((here_BT.sum(1) != patches).any()):
            raise BadOption(f"{len(pixels_B3SS)} pictures for {len(tokens_BT)} rows with {here_BT.sum(1).tolist()[:8]} "
                            "image tokens", expected=f"a picture a row, and {patches} image tokens in each",
                            do=f"put the token {self.image_token} {patches} times where the picture belongs")
        vectors_BPC = self.vision(pixels_B3SS.to(state.hidden.device)).to(state.hidden)
        hidden_BTC = state.hidden.clone()
        hidden_BTC[here_BT] = vectors_BPC.flatten(0, 1)
        return state.moved(hidden_BTC, 0)

    def rebuilt(self, spec: StackSpec, blocks: Iterable[nn.Module], *, embedding: nn.Module | None = None,
                head: nn.Module | None = None) -> VisionLanguageStack:
        return self._seeing(super().rebuilt(spec, blocks, embedding=embedding, head=head), self.vision)

    def copied(self, dtype: torch.dtype | None = None) -> VisionLanguageStack:
        return self._seeing(super().copied(dtype), copy.deepcopy(self.vision).to(dtype=dtype))

    def _seeing(self, plain: DecoderStack, vision: Vision) -> VisionLanguageStack:
        return VisionLanguageStack(plain.decoder, vision, self.image_token, name=plain.name,
                                   tokenizer=plain.tokenizer)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from super().tensors()
        for name, tensor in self.vision.state_dict().items():
            yield f"vision.{name}", tensor

    def save(self, folder: str | Path, notes: Mapping[str, Any] | None = None) -> Path:
        """Write decoder and vision side by side, re-open them, compare logits, and only then put them in place.

        `notes` about where the model comes from are kept in its `config.json`.
        """
        target = Path(folder)
        with atomic.folder(target) as beside:
            save(beside / "decoder", self.spec, super().tensors(),
                 assets=self.tokenizer.folder if self.tokenizer else None)
            (beside / "vision").mkdir()
            write(beside / "vision" / "model.safetensors", self.vision.state_dict())
            manifest.write(beside / "vision")
            config = {"model_type": KIND, "image_token": self.image_token, "vision": asdict(self.vision.spec),
                      "notes": dict(notes or {})}
            (beside / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
            self._compare(beside)
        self.folder = target
        return target

    @torch.inference_mode()
    def _compare(self, written: Path) -> None:
        generator, side = torch.Generator().manual_seed(0), self.vision.spec.side
        tokens_1T = torch.full((1, self.vision.spec.patches), self.image_token)
        pixels_13SS = torch.randint(256, (1, 3, side, side), generator=generator, dtype=torch.uint8)
        expected, found = (stack(tokens_1T, pixels_B3SS=pixels_13SS).float()
                           for stack in (self, open_vision_language(written)))
        difference, allowed = float((found - expected).abs().max()), 1e-3 * float(expected.abs().max())
        if not difference <= allowed:
            raise BadFile(f"the re-opened copy of {self.name}: logits differ by {difference:.3g}",
                          expected=f"at most {allowed:.3g}",
                          do="report this with the layer table; nothing was written")


def is_vision_language(source: str | Path) -> bool:
    """Whether this is a folder written by `VisionLanguageStack.save`."""
    config = Path(source) / "config.json"
    return config.is_file() and read_json(config).get("model_type") == KIND


def open_vision_language(folder: str | Path, *, device: torch.device | None = None,
                         dtype: torch.dtype | None = None) -> VisionLanguageStack:
    """The inverse of `save`. Raises BadFile for files that are absent or damaged."""
    folder = Path(folder)
    config = read_json(folder / "config.json")
    manifest.verify(folder / "vision")
    try:
        spec = VisionSpec(**{**config["vision"], "widths": tuple(config["vision"]["widths"])})
        image_token = int(config["image_token"])
    except (KeyError, TypeError, ValueError) as error:
        raise BadFile(f"{folder / 'config.json'} makes no sense: {error!r}", expected="image_token and vision",
                      do="copy the folder again") from error
    found = read(folder / "decoder")
    decoder = load(found.spec, found.weights, stream=False, device=device, dtype=dtype)
    with torch.device("meta"):
        vision = Vision(spec)
    stored = SafetensorsCheckpoint(folder / "vision")
    tensors = {name: tensor.to(device=device, dtype=dtype) for name, tensor in stored.tensors(stored.names()).items()}
    vision.load_state_dict(tensors, assign=True)
    return VisionLanguageStack(decoder, vision.requires_grad_(False).eval(), image_token, name=folder.name,
                               tokenizer=found.tokenizer, folder=folder)
