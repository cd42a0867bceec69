"""Mistral: Llama with the same sliding window on every layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from layerwise.nets.families.base import Config, uniform_row
from layerwise.nets.families.llama import Llama, common_config
from layerwise.spec import Attention, StackSpec


class Mistral(Llama):
    model_type = "mistral"
    architecture = "MistralForCausalLM"

    def attention(self, config: Config, layer: int) -> Attention:
        return replace(super().attention(config, layer), window=config.get("sliding_window"))

    def config(self, spec: StackSpec) -> dict[str, Any]:
        row = uniform_row(spec)
        return common_config(self, spec, row) | {"sliding_window": row.mixer.window}  # type: ignore[union-attr]
