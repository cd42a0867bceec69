"""Qwen 3: Llama with a norm on every query and key head, and a sliding window on chosen layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from layerwise.nets.families.base import Config, uniform
from layerwise.nets.families.llama import Llama, common_config
from layerwise.nets.families.qwen2 import window, window_config, without_window
from layerwise.spec import Attention, StackSpec


class Qwen3(Llama):
    model_type = "qwen3"
    architecture = "Qwen3ForCausalLM"

    def attention(self, config: Config, layer: int) -> Attention:
        return replace(super().attention(config, layer), qk_norm=True, window=window(config, layer))

    def config(self, spec: StackSpec) -> dict[str, Any]:
        row = uniform(spec, without_window)
        return common_config(self, spec, row) | window_config(spec) | {
            "attention_bias": row.mixer.qkv_bias}  # type: ignore[union-attr]
