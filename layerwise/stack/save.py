"""Saving a decoder: written beside, re-opened, its logits compared, and only then in place."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from layerwise.errors import BadFile
from layerwise.io.save import save

if TYPE_CHECKING:
    from layerwise.stack.decoder import DecoderStack


@torch.inference_mode()
def save_stack(stack: DecoderStack, folder: Path) -> Path:
    """Write `stack` to `folder` (see `DecoderStack.save`) and return the folder."""
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(stack.spec.vocabulary, (2, 16), generator=generator)
    expected_BTV = stack(tokens_BT).float()

    def check(written: Path) -> None:
        from layerwise.stack.open import open

        found_BTV = open(written, stream=stack.streamed)(tokens_BT).float()
        difference = float((found_BTV.to(expected_BTV.device) - expected_BTV).abs().max())
        allowed = 1e-3 * float(expected_BTV.abs().max())
        if not difference <= allowed:
            raise BadFile(f"the re-opened copy of {stack.name}: logits differ by {difference:.3g}",
                          expected=f"at most {allowed:.3g}",
                          do="report this with the layer table; nothing was written")

    assets = stack.tokenizer.folder if stack.tokenizer else None
    save(folder, stack.spec, stack.tensors(), assets=assets, check=check)
    stack.folder = folder
    return folder
