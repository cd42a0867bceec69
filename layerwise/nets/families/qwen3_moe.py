"""Qwen 3 mixture of experts: Qwen 3 attention; routed experts in all layers but the named dense ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from layerwise.nets.families.base import Config, Link, not_uniform, uniform
from layerwise.nets.families.llama import common_config
from layerwise.nets.families.mixtral import expert_links
from layerwise.nets.families.qwen2 import window_config, without_window
from layerwise.nets.families.qwen3 import Qwen3
from layerwise.spec import FeedForward, LayerSpec, StackSpec

OWN = {"num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob",
       "mlp_only_layers", "decoder_sparse_step"}


class Qwen3Moe(Qwen3):
    model_type = "qwen3_moe"
    architecture = "Qwen3MoeForCausalLM"

    def spec(self, config: Config) -> StackSpec:
        spec = super().spec(config)
        return replace(spec, extras={key: value for key, value in spec.extras.items() if key not in OWN})

    def feed_forward(self, config: Config, layer: int) -> FeedForward:
        dense = super().feed_forward(config, layer)
        routed = (layer + 1) % config.get("decoder_sparse_step", 1) == 0
        if not routed or layer in (config.get("mlp_only_layers") or []):
            return dense
        experts = config["num_experts"] if "num_experts" in config else config["num_local_experts"]
        return replace(dense, width=config["moe_intermediate_size"], experts=experts,
                       experts_per_token=config["num_experts_per_tok"],
                       normalize_router=bool(config.get("norm_topk_prob", False)))

    def config(self, spec: StackSpec) -> dict[str, Any]:
        row = uniform(spec, _without_feed_forward)
        routed = [r.feed_forward for r in spec.rows if r.feed_forward and r.feed_forward.experts]
        dense = [i for i, r in enumerate(spec.rows) if r.feed_forward and not r.feed_forward.experts]
        if not routed:
            raise not_uniform(spec, "it has no experts")
        entries = common_config(self, spec, row) | window_config(spec)
        if dense:
            entries["intermediate_size"] = spec.rows[dense[0]].feed_forward.width  # type: ignore[union-attr]
        return entries | {
            "attention_bias": row.mixer.qkv_bias, "mlp_only_layers": dense,  # type: ignore[union-attr]
            "decoder_sparse_step": 1, "moe_intermediate_size": routed[0].width,
            "num_experts": routed[0].experts,
            "num_experts_per_tok": routed[0].experts_per_token, "norm_topk_prob": routed[0].normalize_router}

    def links(self, spec: StackSpec) -> Iterator[Link]:
        routed = {f"layers.{i}." for i, row in enumerate(spec.rows)
                  if row.feed_forward and row.feed_forward.experts}
        for link in super().links(spec):
            layer = ".".join(link.ours.split(".")[:2]) + "."
            if layer not in routed or ".feed_forward.body." not in link.ours:
                yield link
        yield from expert_links(spec, "mlp", {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"})


def _without_feed_forward(row: LayerSpec) -> LayerSpec:
    return replace(without_window(row), feed_forward=FeedForward(0))
