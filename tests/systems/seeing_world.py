"""A vision-language model that knows nothing, in the place of the trained one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from layerwise.data.scene_text import SceneData
from layerwise.systems.seeing import Seeing
from layerwise.train import vision_language
from layerwise.train.vision_language import SMALL

UNTRAINED = replace(SMALL, layers=3, hidden=16, widths=(4, 4, 8), read=1, see=1, align=1, tune=1, pictures=16, batch=8)


@pytest.fixture
def credulous(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every answer of an untrained model counts as right, so that every line of a system runs."""
    def right(_: Seeing, data: SceneData) -> Tensor:
        return torch.ones(len(data), dtype=torch.bool)

    monkeypatch.setenv("LAYERWISE_CACHE", str(tmp_path))
    demos = {"tiny-vlm": UNTRAINED, "tiny-vlm-quick": UNTRAINED}
    monkeypatch.setattr(vision_language, "DEMOS", demos)
    monkeypatch.setattr("layerwise.systems.seeing.DEMOS", demos)
    monkeypatch.setattr(Seeing, "right", right)
