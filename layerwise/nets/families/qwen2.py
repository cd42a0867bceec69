"""Qwen 2: Llama with biases on queries, keys and values, and a sliding window on chosen layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from layerwise.nets.families.base import Config, uniform
from layerwise.nets.families.llama import Llama, common_config
from layerwise.spec import Attention, LayerSpec, StackSpec


class Qwen2(Llama):
    model_type = "qwen2"
    architecture = "Qwen2ForCausalLM"

    def attention(self, config: Config, layer: int) -> Attention:
        return replace(super().attention(config, layer), qkv_bias=True, out_bias=False,
                       window=window(config, layer))

    def config(self, spec: StackSpec) -> dict[str, Any]:
        return common_config(self, spec, uniform(spec, without_window)) | window_config(spec)


def window(config: Config, layer: int) -> int | None:
    """The sliding window of `layer`, from `layer_types` or from the older `max_window_layers`."""
    if config.get("layer_types"):
        return config["sliding_window"] if config["layer_types"][layer] == "sliding_attention" else None
    slides = config.get("use_sliding_window") and layer >= config.get("max_window_layers", 0)
    return config.get("sliding_window") if slides else None


def window_config(spec: StackSpec) -> dict[str, Any]:
    """The entries that say which layers slide."""
    windows = [row.mixer.window for row in spec.rows]  # type: ignore[union-attr]
    width = next((w for w in windows if w is not None), None)
    return {"use_sliding_window": width is not None, "sliding_window": width,
            "layer_types": ["full_attention" if w is None else "sliding_attention" for w in windows]}


def without_window(row: LayerSpec) -> LayerSpec:
    """The row with its window forgotten: what must be equal over all layers."""
    assert isinstance(row.mixer, Attention)
    return replace(row, mixer=replace(row.mixer, window=None))
